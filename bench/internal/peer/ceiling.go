package peer

import (
	"bytes"
	"fmt"
	"net/http"
	"strings"
	"sync"
	"time"

	"github.com/gorilla/websocket"
)

// ceiling is a server that only reads and writes. It speaks the Mesh wire protocol, keeps
// the watchers of rooms in memory, answers joins with bytes made beforehand, and delivers
// a state as one prepared frame in a loop over the sockets.
type ceiling struct {
	up websocket.Upgrader

	mu       sync.Mutex // guards watchers and seq, and is held while a state is delivered
	watchers map[string][]*ceilingConn
	seq      int
}

type ceilingConn struct {
	mu sync.Mutex // of writing
	ws *websocket.Conn
}

func newCeiling() *ceiling {
	return &ceiling{
		up:       websocket.Upgrader{CheckOrigin: func(*http.Request) bool { return true }, WriteBufferPool: &sync.Pool{}},
		watchers: map[string][]*ceilingConn{},
	}
}

// present is the answer to a join: 50 members.
var present = func() string {
	one := `{"id":"PVYSSQK7MXHCAWYDRLYOHL7DCN","metadata":{"avatar":"https://example.com/a/4711.png","name":"Ada Lovelace","userId":"user-4711"}}`
	return `{"success":true,"present":[` + strings.Repeat(one+",", 49) + one + `]}`
}()

func (s *ceiling) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	ws, err := s.up.Upgrade(w, r, nil)
	if err != nil {
		return
	}
	c := &ceilingConn{ws: ws}
	defer ws.Close()
	if c.write(`{"command":"mesh/assign-id","payload":"PVYSSQK7MXHCAWYDRLYOHL7DCN"}`) != nil {
		return
	}
	for {
		_, data, err := ws.ReadMessage()
		if err != nil {
			s.forget(c)
			return
		}
		if s.handle(c, data) != nil {
			return
		}
	}
}

// handle finds the command by searching for words.
func (s *ceiling) handle(c *ceilingConn, data []byte) error {
	id := field(data, `"id":`, ',')
	room := field(data, `"roomName":"`, '"')
	command := field(data, `"command":"`, '"')
	answer := `true`
	switch command {
	case "mesh/join-room":
		answer = present
	case "mesh/subscribe-presence":
		s.mu.Lock()
		s.watchers[room] = append(s.watchers[room], c)
		s.mu.Unlock()
		answer = `{"success":true,"present":[],"states":{}}`
	case "mesh/publish-presence-state":
		_, state, _ := bytes.Cut(data, []byte(`"state":`))
		if err := s.tell(room, bytes.TrimSuffix(state, []byte("}}"))); err != nil {
			return err
		}
	}
	return c.write(`{"id":` + id + `,"command":"` + command + `","payload":` + answer + `}`)
}

func (s *ceiling) tell(room string, state []byte) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.seq++
	text := fmt.Appendf(nil, `{"command":"mesh/presence-update","payload":{"type":"state","connectionId":"PVYSSQK7MXHCAWYDRLYOHL7DCN",`+
		`"roomName":%q,"timestamp":%d,"seq":%d,"epoch":"PVYSSQK7MXHCAWYD","state":%s}}`, room, time.Now().UnixMilli(), s.seq, state)
	m, err := websocket.NewPreparedMessage(websocket.TextMessage, text)
	if err != nil {
		return err
	}
	for _, c := range s.watchers[room] {
		c.mu.Lock()
		_ = c.ws.WritePreparedMessage(m)
		c.mu.Unlock()
	}
	return nil
}

func (s *ceiling) forget(c *ceilingConn) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for room, list := range s.watchers {
		for i, other := range list {
			if other == c {
				s.watchers[room] = append(list[:i:i], list[i+1:]...)
				break
			}
		}
	}
}

func (c *ceilingConn) write(text string) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.ws.WriteMessage(websocket.TextMessage, []byte(text))
}

// field returns the text between begin and end.
func field(data []byte, begin string, end byte) string {
	_, rest, _ := bytes.Cut(data, []byte(begin))
	if i := bytes.IndexByte(rest, end); i >= 0 {
		return string(rest[:i])
	}
	return ""
}
