package browsertest

import (
	"testing"
	"time"

	"github.com/meshpresence/mesh/meshtest"
)

// person is a client without a browser. It may send anything.
type person struct {
	*meshtest.Client
	t testing.TB
}

// newPerson connects to a server. key is the user's secret. An empty key makes a new
// user.
func newPerson(t testing.TB, s *server, key string) *person {
	t.Helper()
	return &person{meshtest.Connect(t, "ws://"+s.addr+"/ws?key="+key, meshtest.WithTimeout(timeLimit)), t}
}

// join sets the metadata and joins a room.
func (p *person) join(room string, metadata any) {
	p.t.Helper()
	p.SetMetadata(metadata, "")
	p.Join(room)
}

// publish publishes a state with a lifetime.
func (p *person) publish(room string, state any, life time.Duration) {
	p.t.Helper()
	if !p.PublishState(room, state, meshtest.StateOptions{ExpireAfter: life}) {
		p.t.Fatalf("state %v is refused", state)
	}
}
