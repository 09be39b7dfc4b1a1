package attack

import (
	"encoding/binary"
	"fmt"
	"strings"
	"testing"

	"github.com/gorilla/websocket"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/meshpresence/mesh/internal/e2e/harness"
)

// garbage is bytes that a client sends, and what comes of it: answers with
// these codes, by id ("" is no error), or the end with a close code. Neither:
// it is ignored. Whoever was not shown out is served afterwards.
type garbage struct {
	name    string
	bytes   []byte
	answers map[string]string
	closing int
}

func said(text string) []byte { return wireFrame(finText, text) }

func answered(id, code string) map[string]string { return map[string]string{id: code} }

func request(id string) []byte { return said(`{"id":` + id + `,"command":"mesh/noop","payload":{}}`) }

// garbageList is in the order: what is no request; odd requests; what is no
// WebSocket.
func garbageList() []garbage {
	deep := strings.Repeat("[", 30_000)
	fragments := wireFrame(0x01, `{"id":5,"comm`)
	for _, part := range []string{`and`, ``, `":"mesh/noop`} {
		fragments = append(fragments, wireFrame(0x00, part)...)
		fragments = append(fragments, wireFrame(finPing, "between")...)
	}
	fragments = append(fragments, wireFrame(0x80, `"}`)...)
	unmasked := request("1")
	unmasked[1] &^= 0x80
	const protocol, large = websocket.CloseProtocolError, websocket.CloseMessageTooBig
	return []garbage{
		{name: "no JSON", bytes: said("hello")},
		{name: "empty", bytes: said("")},
		{name: "cut JSON", bytes: said(`{"id":1,"command":"mesh/noop"`)},
		{name: "two values", bytes: said(`{"id":1,"command":"mesh/noop"}{}`)},
		{name: "an array", bytes: said(`[{"id":1,"command":"mesh/noop"}]`)},
		{name: "no command", bytes: said(`{"id":1}`)},
		{name: "a command that is a number", bytes: said(`{"id":1,"command":1}`)},
		{name: "binary", bytes: wireFrame(finBinary, `{"id":1,"command":"mesh/noop"}`)},
		{name: "not UTF-8", bytes: said("{\"id\":1,\"command\":\"mesh/noop\",\"payload\":\"\xff\xc0\xaf\"}")},
		{name: "surrogates in UTF-8", bytes: said("{\"id\":1,\"command\":\"mesh/noop\",\"payload\":\"\xed\xa0\x80\"}")},
		{name: "a byte order mark", bytes: said("\ufeff" + `{"id":1,"command":"mesh/noop"}`)},
		{name: "NUL", bytes: said(strings.Repeat("\x00", 1000))},
		{name: "deep", bytes: said(`{"id":1,"command":"mesh/noop","payload":` + deep + strings.Repeat("]", len(deep)) + `}`)},
		{name: "deep and cut", bytes: said(`{"id":1,"command":"mesh/noop","payload":` + deep + deep)},
		{name: "an id that is a string", bytes: request(`"1"`)},
		{name: "an id that is null", bytes: request(`null`)},
		{name: "an id that is an object", bytes: request(`{"id":1}`)},

		{name: "a negative id", bytes: request("-1"), answers: answered("-1", "")},
		{name: "a fraction", bytes: request("1.50"), answers: answered("1.50", "")},
		{name: "a huge id", bytes: request("1e400"), answers: answered("1e400", "")},
		{name: "a long id", bytes: request(strings.Repeat("9", 60_000)), answers: answered(strings.Repeat("9", 60_000), "")},
		{name: "the same id twice", bytes: append(request("3"), request("3")...), answers: answered("3", "")},
		{name: "keys twice", bytes: said(`{"id":1,"command":"x","id":2,"command":"mesh/noop"}`), answers: answered("2", "")},
		{name: "an unknown command", bytes: said(`{"id":1,"command":"` + strings.Repeat("x", 60_000) + `"}`), answers: answered("1", "ENOTFOUND")},
		{name: "a push", bytes: said(`{"id":1,"command":"mesh/presence-update","payload":{}}`), answers: answered("1", "ENOTFOUND")},
		{name: "a payload that is a list", bytes: said(`{"id":1,"command":"mesh/join-room","payload":[]}`), answers: answered("1", "EINVALID")},
		{name: "a number that is none", bytes: said(`{"id":1,"command":"mesh/publish-presence-state","payload":{"roomName":"x","state":{},"expireAfter":1e999}}`), answers: answered("1", "")},
		{name: "no payload", bytes: said(`{"id":1,"command":"mesh/join-room"}`), answers: answered("1", "EINVALID")},
		{name: "fragments with pings between", bytes: fragments, answers: answered("5", "")},

		{name: "a giant length", bytes: append(frameHead(finText, 1<<40), 0, 0, 0, 0), closing: large},
		{name: "the largest length", bytes: binary.BigEndian.AppendUint64([]byte{finText, 0xff}, 1<<64-1), closing: large},
		{name: "too large", bytes: said(strings.Repeat("x", 64<<10+1)), closing: large},
		{name: "too large in fragments", bytes: append(wireFrame(0x01, strings.Repeat("x", 40<<10)), wireFrame(0x80, strings.Repeat("x", 40<<10))...), closing: large},
		{name: "no mask", bytes: unmasked, closing: protocol},
		{name: "reserved bits", bytes: wireFrame(0xb1, "x"), closing: protocol},
		{name: "compressed, which was not agreed on", bytes: wireFrame(0xc1, "\xaa\x56\x4a"), closing: protocol},
		{name: "an unknown kind of frame", bytes: wireFrame(0x83, "x"), closing: protocol},
		{name: "a continuation of nothing", bytes: wireFrame(0x80, "x"), closing: protocol},
		{name: "a message within another", bytes: append(wireFrame(0x01, "x"), wireFrame(finText, "y")...), closing: protocol},
		{name: "a ping in fragments", bytes: wireFrame(0x09, "x"), closing: protocol},
		{name: "a ping that is too long", bytes: wireFrame(finPing, strings.Repeat("x", 126)), closing: protocol},
		{name: "a close frame of one byte", bytes: wireFrame(finClose, "\x03"), closing: websocket.CloseNoStatusReceived},
		{name: "a close code that is none", bytes: wireFrame(finClose, "\x03\xed"), closing: protocol},
		{name: "a close reason that is no text", bytes: wireFrame(finClose, "\x03\xe8\xff"), closing: protocol},
		{name: "HTTP", bytes: []byte("GET / HTTP/1.1\r\nHost: x\r\n\r\n"), closing: protocol},
	}
}

// TestAttackGarbage: each on a connection of its own, all on one server.
func TestAttackGarbage(t *testing.T) {
	t.Parallel()
	harness.Long(t, "a server in a process of its own")
	f := newFort(t, harness.ChildConfig{})
	f.under(perEnemy+spare, func() {
		for range 3 {
			for _, g := range garbageList() {
				e := dialEnemy(t, f.Addr)
				require.NoError(t, e.raw(g.bytes), g.name)
				if g.closing != 0 {
					require.Equal(t, g.closing, e.code(), g.name)
				} else {
					require.NoError(t, e.garbled(g.answers), g.name)
				}
				e.gone()
			}
		}
		assert.Zero(t, f.gauge().Stats.Closed["flood"])
	})
}

// garbled asks for something once garbage has been sent, and wants the answers to both
// in any order, and no other.
func (e *enemy) garbled(answers map[string]string) error {
	if err := e.raw(request("77")); err != nil {
		return err
	}
	came := map[string]bool{}
	for !came["77"] || len(came) != len(answers)+1 {
		text, err := e.read()
		if err != nil {
			return fmt.Errorf("answers to %v only: %w", came, err)
		}
		id, _, _ := strings.Cut(strings.TrimPrefix(text, `{"id":`), ",")
		if code, ok := answers[id]; id != "77" && (!ok || code != codeIn(text)) {
			return fmt.Errorf("answered with %.200s", text)
		}
		came[id] = true
	}
	return nil
}
