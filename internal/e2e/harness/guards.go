package harness

import (
	"context"
	"encoding/json"
	"fmt"
	"net/http"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/meshpresence/mesh"
)

// ByHeader makes the header X-Meta a connection's metadata.
func ByHeader(o *mesh.Options) {
	o.Authenticate = func(_ context.Context, r *http.Request) (any, error) {
		return json.RawMessage(r.Header.Get("X-Meta")), nil
	}
}

// Meta returns the header for ByHeader.
func Meta(text string) http.Header { return http.Header{"X-Meta": {text}} }

// AdminsOnly is a guard that accepts members with the metadata Admin.
func AdminsOnly(_ context.Context, m mesh.Member, _ string) (bool, error) {
	v, err := mesh.MetadataOf[struct{ IsAdmin bool }](m)
	return v.IsAdmin, err
}

// Metadata for AdminsOnly.
const (
	Admin   = `{"isAdmin":true}`
	Visitor = `{"isAdmin":false}`
)

// NotBanned is a join guard that takes 300 ms, and refuses metadata with the word banned.
func NotBanned(_ context.Context, m mesh.Member, _ string) (bool, error) {
	time.Sleep(300 * time.Millisecond)
	return !strings.Contains(string(m.Metadata), "banned"), nil
}

// Never is a guard that refuses.
func Never(context.Context, mesh.Member, string) (bool, error) { return false, nil }

// Register is a guard with a list of rights that a test can change.
type Register struct {
	mu    sync.Mutex // guards out, asked
	out   map[string]bool
	asked map[string]int // by connection id
}

// Guard is a mesh.Guard.
func (r *Register) Guard(_ context.Context, m mesh.Member, _ string) (bool, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.asked == nil {
		r.asked = make(map[string]int)
	}
	r.asked[m.ID]++
	return !r.out[m.ID], nil
}

// Set changes the right of a connection.
func (r *Register) Set(conn string, allowed bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.out == nil {
		r.out = make(map[string]bool)
	}
	r.out[conn] = !allowed
}

// Times returns how often Guard was called for a connection.
func (r *Register) Times(conn string) int {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.asked[conn]
}

// Counted is a guard that counts its calls by room.
type Counted struct{ rooms sync.Map }

func (c *Counted) Guard(_ context.Context, _ mesh.Member, room string) (bool, error) {
	n, _ := c.rooms.LoadOrStore(room, new(atomic.Int64))
	n.(*atomic.Int64).Add(1)
	return true, nil
}

func (c *Counted) Of(room string) int64 {
	n, ok := c.rooms.Load(room)
	if !ok {
		return 0
	}
	return n.(*atomic.Int64).Load()
}

// EndedRoom reports whether the peer received the push that its subscription to a room
// ended.
func (p *Peer) EndedRoom(room string) bool {
	p.Mu.Lock()
	defer p.Mu.Unlock()
	for _, f := range p.Pushes {
		if f.Command == "mesh/presence-ended" && string(f.Payload) == fmt.Sprintf(`{"roomName":%q}`, room) {
			return true
		}
	}
	return false
}
