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

// garbage is a sequence of bytes from a client. The server either answers with codes,
// by request id ("" is no error), or closes the connection with a code, or ignores it.
// A connection that is not closed is served afterwards.
type garbage struct {
	name    string
	bytes   []byte
	answers map[string]string
	closing int
}

func textMessage(text string) []byte { return wireFrame(finText, text) }

func answered(id, code string) map[string]string { return map[string]string{id: code} }

func request(id string) []byte {
	return textMessage(`{"id":` + id + `,"command":"mesh/noop","payload":{}}`)
}

// garbageList contains text that is no request, then odd requests, then invalid
// WebSocket frames.
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
		{name: "no JSON", bytes: textMessage("hello")},
		{name: "empty", bytes: textMessage("")},
		{name: "cut JSON", bytes: textMessage(`{"id":1,"command":"mesh/noop"`)},
		{name: "two values", bytes: textMessage(`{"id":1,"command":"mesh/noop"}{}`)},
		{name: "an array", bytes: textMessage(`[{"id":1,"command":"mesh/noop"}]`)},
		{name: "no command", bytes: textMessage(`{"id":1}`)},
		{name: "a command that is a number", bytes: textMessage(`{"id":1,"command":1}`)},
		{name: "binary", bytes: wireFrame(finBinary, `{"id":1,"command":"mesh/noop"}`)},
		{name: "not UTF-8", bytes: textMessage("{\"id\":1,\"command\":\"mesh/noop\",\"payload\":\"\xff\xc0\xaf\"}")},
		{name: "surrogates in UTF-8", bytes: textMessage("{\"id\":1,\"command\":\"mesh/noop\",\"payload\":\"\xed\xa0\x80\"}")},
		{name: "a byte order mark", bytes: textMessage("\ufeff" + `{"id":1,"command":"mesh/noop"}`)},
		{name: "NUL", bytes: textMessage(strings.Repeat("\x00", 1000))},
		{name: "deep", bytes: textMessage(`{"id":1,"command":"mesh/noop","payload":` + deep + strings.Repeat("]", len(deep)) + `}`)},
		{name: "deep and cut", bytes: textMessage(`{"id":1,"command":"mesh/noop","payload":` + deep + deep)},
		{name: "an id that is a string", bytes: request(`"1"`)},
		{name: "an id that is null", bytes: request(`null`)},
		{name: "an id that is an object", bytes: request(`{"id":1}`)},

		{name: "a negative id", bytes: request("-1"), answers: answered("-1", "")},
		{name: "a fraction", bytes: request("1.50"), answers: answered("1.50", "")},
		{name: "a huge id", bytes: request("1e400"), answers: answered("1e400", "")},
		{name: "a long id", bytes: request(strings.Repeat("9", 60_000)), answers: answered(strings.Repeat("9", 60_000), "")},
		{name: "the same id twice", bytes: append(request("3"), request("3")...), answers: answered("3", "")},
		{name: "keys twice", bytes: textMessage(`{"id":1,"command":"x","id":2,"command":"mesh/noop"}`), answers: answered("2", "")},
		{name: "an unknown command", bytes: textMessage(`{"id":1,"command":"` + strings.Repeat("x", 60_000) + `"}`), answers: answered("1", "ENOTFOUND")},
		{name: "a push", bytes: textMessage(`{"id":1,"command":"mesh/presence-update","payload":{}}`), answers: answered("1", "ENOTFOUND")},
		{name: "a payload that is a list", bytes: textMessage(`{"id":1,"command":"mesh/join-room","payload":[]}`), answers: answered("1", "EINVALID")},
		{name: "an invalid number", bytes: textMessage(`{"id":1,"command":"mesh/publish-presence-state","payload":{"roomName":"x","state":{},"expireAfter":1e999}}`), answers: answered("1", "")},
		{name: "no payload", bytes: textMessage(`{"id":1,"command":"mesh/join-room"}`), answers: answered("1", "EINVALID")},
		{name: "fragments with pings between", bytes: fragments, answers: answered("5", "")},

		{name: "a giant length", bytes: append(frameHead(finText, 1<<40), 0, 0, 0, 0), closing: large},
		{name: "the largest length", bytes: binary.BigEndian.AppendUint64([]byte{finText, 0xff}, 1<<64-1), closing: large},
		{name: "too large", bytes: textMessage(strings.Repeat("x", 64<<10+1)), closing: large},
		{name: "too large in fragments", bytes: append(wireFrame(0x01, strings.Repeat("x", 40<<10)), wireFrame(0x80, strings.Repeat("x", 40<<10))...), closing: large},
		{name: "no mask", bytes: unmasked, closing: protocol},
		{name: "reserved bits", bytes: wireFrame(0xb1, "x"), closing: protocol},
		{name: "compressed without negotiation", bytes: wireFrame(0xc1, "\xaa\x56\x4a"), closing: protocol},
		{name: "an unknown opcode", bytes: wireFrame(0x83, "x"), closing: protocol},
		{name: "a continuation of nothing", bytes: wireFrame(0x80, "x"), closing: protocol},
		{name: "a message within another", bytes: append(wireFrame(0x01, "x"), wireFrame(finText, "y")...), closing: protocol},
		{name: "a ping in fragments", bytes: wireFrame(0x09, "x"), closing: protocol},
		{name: "a ping that is too long", bytes: wireFrame(finPing, strings.Repeat("x", 126)), closing: protocol},
		{name: "a close frame of one byte", bytes: wireFrame(finClose, "\x03"), closing: websocket.CloseNoStatusReceived},
		{name: "an invalid close code", bytes: wireFrame(finClose, "\x03\xed"), closing: protocol},
		{name: "a close reason that is not UTF-8", bytes: wireFrame(finClose, "\x03\xe8\xff"), closing: protocol},
		{name: "HTTP", bytes: []byte("GET / HTTP/1.1\r\nHost: x\r\n\r\n"), closing: protocol},
	}
}

// TestAttackGarbage sends each kind of garbage on a connection of its own, all to one
// server.
func TestAttackGarbage(t *testing.T) {
	t.Parallel()
	harness.Long(t, "starts a server process")
	f := newTarget(t, harness.ChildConfig{})
	f.run(perAttacker+spare, func() {
		for range 3 {
			for _, g := range garbageList() {
				e := dialAttacker(t, f.Addr)
				require.NoError(t, e.raw(g.bytes), g.name)
				if g.closing != 0 {
					require.Equal(t, g.closing, e.code(), g.name)
				} else {
					require.NoError(t, e.checkAnswers(g.answers), g.name)
				}
				e.drop()
			}
		}
		assert.Zero(t, f.gauge().Stats.Closed["flood"])
	})
}

// checkAnswers sends a request after garbage. It checks that the answers to both
// arrive, in any order, and no others.
func (e *attacker) checkAnswers(answers map[string]string) error {
	if err := e.raw(request("77")); err != nil {
		return err
	}
	received := map[string]bool{}
	for !received["77"] || len(received) != len(answers)+1 {
		text, err := e.read()
		if err != nil {
			return fmt.Errorf("only received answers to %v: %w", received, err)
		}
		id, _, _ := strings.Cut(strings.TrimPrefix(text, `{"id":`), ",")
		if code, ok := answers[id]; id != "77" && (!ok || code != codeIn(text)) {
			return fmt.Errorf("answer %.200s", text)
		}
		received[id] = true
	}
	return nil
}
