package wire

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"math"
	"net"
	"net/http"
	"net/http/httptest"
	"strconv"
	"strings"
	"sync"
	"testing"

	"github.com/gorilla/websocket"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func TestAnswers(t *testing.T) {
	t.Parallel()
	states := map[string]json.RawMessage{"b": json.RawMessage(`{"s":1.10}`), "a": json.RawMessage(`[]`)}
	present := []Member{{ID: "a", Metadata: json.RawMessage(`{"n":1e2}`)}, {ID: "b"}}
	ann := []Member{
		{ID: "a", UserID: `an"n`, Metadata: json.RawMessage(`{}`), JoinedAt: 5}, {ID: "b", JoinedAt: 1_700_000_000_000, Disconnected: true},
	}
	tests := []struct {
		name    string
		payload any
		want    string
	}{
		{"nil", nil, `null`},
		{"true", true, `true`},
		{"number", 12.5, `12.5`},
		{"string", "<a>\u2028", "\"<a>\u2028\""},
		{"no HTML escapes", map[string]string{"a": "<&>"}, `{"a":"<&>"}`},
		{"raw", Raw(`{"a":1}`), `{"a":1}`},
		{"empty raw", Raw(nil), `null`},
		{"raw message", json.RawMessage(`{"a":1.0}`), `{"a":1.0}`},
		{"success", Success{true}, `{"success":true}`},
		{"failure", Success{}, `{"success":false}`},
		{"metadata", Metadata{json.RawMessage(`{"n":1.0}`)}, `{"metadata":{"n":1.0}}`},
		{"no metadata", Metadata{}, `{"metadata":null}`},
		{"ended", Ended{`r"`}, `{"roomName":"r\""}`},
		{"refused", Snapshot{}, `{"success":false,"present":[]}`},
		{"joined", Snapshot{Success: true, Present: present},
			`{"success":true,"present":[{"id":"a","metadata":{"n":1e2}},{"id":"b","metadata":null}]}`},
		{"empty room", Snapshot{Success: true, States: map[string]json.RawMessage{}}, `{"success":true,"present":[],"states":{}}`},
		{"snapshot", Snapshot{Success: true, Present: present[:1], States: states, Extent: Extent{Total: CountOf(9), Stale: true, Epoch: "e", Seq: 3}},
			`{"success":true,"present":[{"id":"a","metadata":{"n":1e2}}],"states":{"a":[],"b":{"s":1.10}},"total":9,"stale":true,"seq":3,"epoch":"e"}`},
		{"subscribed", Snapshot{Success: true, Present: ann, States: states, Extent: Extent{Total: CountOf(0), Numbers: Numbers{Users: CountOf(0)}, Epoch: "e"}},
			`{"success":true,"present":[{"id":"a","userId":"an\"n","metadata":{},"joinedAt":5},` +
				`{"id":"b","metadata":null,"joinedAt":1700000000000,"disconnected":true}],` +
				`"states":{"a":[],"b":{"s":1.10}},"total":0,"users":0,"seq":0,"epoch":"e"}`},
		{"joined a counted room", Snapshot{Success: true, Extent: Extent{Numbers: Numbers{CountOf(2), CountOf(1)}, Epoch: "e", Seq: 1}},
			`{"success":true,"present":[],"connections":2,"users":1,"seq":1,"epoch":"e"}`},
		{"joined a large room", Snapshot{Success: true, Extent: Extent{Total: CountOf(2), Numbers: Numbers{Connections: CountOf(2)}}},
			`{"success":true,"present":[],"total":2,"connections":2}`},
		{"page", Snapshot{Success: true, States: map[string]json.RawMessage{}, Extent: Extent{Next: `"2`, Restart: true, Total: CountOf(5)}},
			`{"success":true,"present":[],"states":{},"next":"\"2","restart":true,"total":5}`},
		{"join refused", Refusal{Code: CodeRefused}, `{"success":false,"present":[],"code":"EREFUSED"}`},
		{"full of users", Refusal{Code: CodeFull, Of: OfUsers, Max: 4}, `{"success":false,"present":[],"code":"EFULL","of":"users","max":4}`},
		{"full of connections", Refusal{Code: CodeFull, Of: OfConnections}, `{"success":false,"present":[],"code":"EFULL","of":"connections","max":0}`},
		{"room joined", RoomJoined{"r"}, `{"roomName":"r"}`},
		{"room left", RoomLeft{`r"`, ReasonFull}, `{"roomName":"r\"","reason":"full"}`},
		{"stale", PresenceStale{Stale: true, RoomNames: []string{"a", `"`}}, `{"stale":true,"roomNames":["a","\""]}`},
		{"all rooms recovered", PresenceStale{}, `{"stale":false}`},
		{"occupancy", Occupancy{RoomName: "r", Numbers: Numbers{CountOf(3), CountOf(2)}, Epoch: "e", Seq: 12, Stale: true},
			`{"roomName":"r","connections":3,"users":2,"seq":12,"epoch":"e","stale":true}`},
		{"occupancy of a new room", Occupancy{RoomName: "r", Numbers: Numbers{Connections: CountOf(0)}}, `{"roomName":"r","connections":0}`},
		{"occupancies", OccupancyAnswer{Rooms: []OccupancyResult{
			{Occupancy: Occupancy{RoomName: "a", Numbers: Numbers{CountOf(2), CountOf(1)}, Epoch: "e", Seq: 10}},
			{Occupancy: Occupancy{RoomName: `b"`}, Code: CodeRefused},
		}}, `{"rooms":{"a":{"success":true,"connections":2,"users":1,"seq":10,"epoch":"e"},"b\"":{"success":false,"code":"EREFUSED"}}}`},
		{"no occupancies", OccupancyAnswer{}, `{"rooms":{}}`},
		{"epoch of seq 0", Snapshot{Success: true, Extent: Extent{Epoch: "e"}}, `{"success":true,"present":[],"seq":0,"epoch":"e"}`},
		{"state snapshot", StateSnapshot{Success: true, Present: []string{"a", "b"}, States: states},
			`{"success":true,"present":["a","b"],"states":{"a":[],"b":{"s":1.10}}}`},
		{"state snapshot refused", StateSnapshot{}, `{"success":false,"present":[]}`},
		{"encoded view", EncodedView{Success: true, Present: Text{AppendMembers(nil, present)}, States: AppendStates(nil, nil)},
			`{"success":true,"present":[{"id":"a","metadata":{"n":1e2}},{"id":"b","metadata":null}],"states":{}}`},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			f, err := Answer("17", CommandJoinRoom, test.payload)
			require.NoError(t, err)
			assert.Equal(t, `{"id":17,"command":"mesh/join-room","payload":`+test.want+`}`, string(f.Bytes()))
			assert.Equal(t, len(f.Bytes()), f.Size())
			f, err = Push("x", test.payload)
			require.NoError(t, err)
			assert.Equal(t, `{"command":"x","payload":`+test.want+`}`, string(f.Bytes()))
			plain, err := json.Marshal(test.payload)
			require.NoError(t, err)
			switch test.payload.(type) {
			case Raw, Occupancy, OccupancyAnswer: // encoding/json does not encode them
			default:
				assert.Equal(t, parse(t, []byte(test.want)), parse(t, plain), "encoding/json agrees")
			}
		})
	}
}

// MarshalJSON makes the comparison with encoding/json above possible.
func (v EncodedView) MarshalJSON() ([]byte, error) { return v.AppendJSON(nil), nil }

func TestFixedFrames(t *testing.T) {
	t.Parallel()
	assert.Equal(t, `{"id":5,"command":"x\"y","payload":{"error":"Command \"x\"y\" not found","code":"ENOTFOUND","name":"CommandError"}}`,
		string(NotFound("5", `x"y`).Bytes()))
	assert.JSONEq(t, `{"id":5,"command":"x","payload":{"error":"Command \"x\" not found","code":"ENOTFOUND","name":"CommandError"}}`,
		string(NotFound("5", "x").Bytes()))
	assert.JSONEq(t, `{"id":5,"command":"x","payload":{"error":"boom","code":"ESERVER","name":"Error"}}`,
		string(ErrorAnswer("5", "x", "boom", CodeServer, NameError).Bytes()))
	assert.Equal(t, `{"command":"mesh/assign-id","payload":"c1"}`, string(AssignID("c1").Bytes()))
	assert.Equal(t, `{"command":"ping","payload":{}}`, string(Ping().Bytes()))
	assert.Equal(t, `{"command":"latency:request","payload":{}}`, string(LatencyRequest().Bytes()))
	assert.Same(t, Ping(), Ping())
}

func TestPushNumbers(t *testing.T) {
	t.Parallel()
	f := PushNumbers(Occupancy{RoomName: "r", Numbers: Numbers{Connections: CountOf(1)}})
	assert.Equal(t, `{"command":"mesh/occupancy","payload":{"roomName":"r","connections":1}}`, string(f.Bytes()))
	assert.Equal(t, "r", f.NumbersOf())
	assert.Empty(t, Ping().NumbersOf())
}

func TestUnencodablePayload(t *testing.T) {
	t.Parallel()
	for _, payload := range []any{math.NaN(), func() {}, json.RawMessage(`{`)} {
		_, err := Answer("1", "x", payload)
		require.ErrorContains(t, err, "mesh: ")
		_, err = Push("x", payload)
		require.ErrorContains(t, err, "mesh: ")
	}
}

// A broken record in Redis must not spoil the frame.
func TestBrokenJSONBecomesNull(t *testing.T) {
	t.Parallel()
	for _, broken := range []string{`{`, `1,2`, `"a`, "\"\xff\"", ` `} {
		raw := json.RawMessage(broken)
		assert.Equal(t, `[{"id":"a","metadata":null}]`, string(AppendMembers(nil, []Member{{ID: "a", Metadata: raw}})))
		assert.Equal(t, `{"a":null}`, string(AppendStates(nil, []StateOf{{"a", raw}})))
	}
}

func TestAppendLists(t *testing.T) {
	t.Parallel()
	assert.Equal(t, `[]`, string(AppendMembers(nil, nil)))
	assert.Equal(t, `x{}`, string(AppendStates([]byte("x"), nil)))
	assert.Equal(t, `{"b":1,"d":2}`, string(AppendStates(nil, []StateOf{
		{ID: "a"}, {"b", json.RawMessage("1")}, {ID: "c"}, {"d", json.RawMessage("2")}, {ID: "e"},
	})), "those without a state are left out")
	assert.Equal(t, `["a","\n"]`, string(AppendIDs(nil, []string{"a", "\n"})))
}

func TestUpdate(t *testing.T) {
	t.Parallel()
	tests := []struct {
		u    *Update
		want string
	}{
		{&Update{Type: UpdateJoin, ConnectionID: "c", RoomName: "r", Timestamp: 5, Metadata: json.RawMessage(`{"a":1.0}`), Seq: 2, Epoch: "e"},
			`{"type":"join","connectionId":"c","roomName":"r","timestamp":5,"metadata":{"a":1.0},"seq":2,"epoch":"e"}`},
		{&Update{Type: UpdateJoin, ConnectionID: "c", RoomName: "r", State: json.RawMessage(`1`)},
			`{"type":"join","connectionId":"c","roomName":"r","timestamp":0,"seq":0,"epoch":""}`},
		{&Update{Type: UpdateLeave, ConnectionID: "c", RoomName: "r", Timestamp: -1, Metadata: json.RawMessage(`1`), State: json.RawMessage(`1`), Repair: true},
			`{"type":"leave","connectionId":"c","roomName":"r","timestamp":-1,"reason":"","seq":0,"epoch":"","repair":true}`},
		{&Update{Type: UpdateLeave, ConnectionID: "<&>", RoomName: "r\xffé", Reason: ReasonLeft},
			`{"type":"leave","connectionId":"<&>","roomName":"r�é","timestamp":0,"reason":"left","seq":0,"epoch":""}`},
		{&Update{Type: UpdateState, ConnectionID: "c", RoomName: "r", Seq: math.MaxUint64},
			`{"type":"state","connectionId":"c","roomName":"r","timestamp":0,"state":null,"seq":18446744073709551615,"epoch":""}`},
		{&Update{Type: UpdateState, ConnectionID: "c", RoomName: "r", State: json.RawMessage(`{"s":1e400}`)},
			`{"type":"state","connectionId":"c","roomName":"r","timestamp":0,"state":{"s":1e400},"seq":0,"epoch":""}`},
	}
	full := func(kind string) *Update {
		return &Update{
			Type: kind, ConnectionID: "c", RoomName: "r", Timestamp: 9, UserID: `an"n`, EntryID: "E", JoinedAt: 5, Metadata: json.RawMessage(`{}`),
			State: json.RawMessage(`{}`), Reason: ReasonLost, Replaces: `"c0`, UserConnections: 2, Numbers: Numbers{CountOf(3), CountOf(1)}, Seq: 7, Epoch: "e",
		}
	}
	const head, tail = `","connectionId":"c","roomName":"r","timestamp":9`, `,"seq":7,"epoch":"e"}`
	for kind, want := range map[string]string{
		UpdateJoin:       `,"metadata":{},"userId":"an\"n","userConnections":2,"joinedAt":5,"replaces":"\"c0","connections":3,"users":1`,
		UpdateLeave:      `,"userId":"an\"n","userConnections":2,"reason":"lost","joinedAt":5,"connections":3,"users":1`,
		UpdateState:      `,"state":{}`,
		UpdateMetadata:   `,"metadata":{}`,
		UpdateDisconnect: `,"reason":"lost"`,
		UpdateReconnect:  ``,
	} {
		tests = append(tests, struct {
			u    *Update
			want string
		}{full(kind), `{"type":"` + kind + head + want + tail})
	}
	// The last connection of a user without metadata, in a room that it leaves empty.
	last := full(UpdateLeave)
	last.UserConnections, last.Numbers = 0, Numbers{CountOf(0), CountOf(0)}
	login, removed := full(UpdateMetadata), full(UpdateMetadata)
	login.NewUser, removed.Metadata = true, nil
	tests = append(tests, []struct {
		u    *Update
		want string
	}{
		{last, `{"type":"leave` + head + `,"userId":"an\"n","userConnections":0,"reason":"lost","joinedAt":5,"connections":0,"users":0` + tail},
		{login, `{"type":"metadata` + head + `,"metadata":{},"userId":"an\"n","userConnections":2,"connections":3,"users":1` + tail},
		{removed, `{"type":"metadata` + head + `,"metadata":null` + tail},
	}...)
	for _, test := range tests {
		assert.Equal(t, `{"command":"mesh/presence-update","payload":`+test.want+`}`, string(test.u.Frame().Bytes()))
		plain, err := json.Marshal(test.u) // encoding/json escapes HTML
		require.NoError(t, err)
		assert.Equal(t, parse(t, []byte(test.want)), parse(t, plain))
	}
}

func TestLevels(t *testing.T) {
	t.Parallel()
	for kind, level := range map[string]int{
		UpdateJoin: 1, UpdateLeave: 1, UpdateState: 1, UpdateMetadata: 2, UpdateDisconnect: 2, UpdateReconnect: 2,
	} {
		assert.Equal(t, level, (&Update{Type: kind}).Level(), kind)
	}
}

func TestCount(t *testing.T) {
	t.Parallel()
	n, ok := Count{}.Get()
	assert.Zero(t, n)
	assert.False(t, ok)
	for _, want := range []int{0, 1, 5_000} {
		n, ok = CountOf(want).Get()
		assert.Equal(t, want, n)
		assert.True(t, ok)
	}
}

// The metadata of a member are found from its end.
func TestAppendMember(t *testing.T) {
	t.Parallel()
	for _, meta := range []string{``, `{}`, `"x"`} {
		for _, m := range []Member{{ID: "a"}, {ID: "a", UserID: "ann", JoinedAt: 1234567890123}, {ID: "a", JoinedAt: 1, Disconnected: true}} {
			m.Metadata = json.RawMessage(meta)
			text, rest := AppendMember([]byte("x"), &m)
			assert.True(t, bytes.HasSuffix(text[:len(text)-rest], []byte(meta)), "%s", text)
			assert.True(t, json.Valid(text[1:]), "%s", text)
		}
	}
}

func TestFramesAreMadeOnce(t *testing.T) {
	t.Parallel()
	u := &Update{Type: UpdateJoin, ConnectionID: "c", RoomName: "r"}
	frames := make([]*Frame, 16)
	prepared := make([]*websocket.PreparedMessage, len(frames))
	var wg sync.WaitGroup
	for i := range frames {
		wg.Go(func() {
			frames[i] = u.Frame()
			p, err := frames[i].Prepared()
			assert.NoError(t, err)
			prepared[i] = p
		})
	}
	wg.Wait()
	for i := range frames {
		assert.Same(t, frames[0], frames[i])
		assert.Same(t, prepared[0], prepared[i])
	}
}

// A prepared frame reaches a client as one text message with the same bytes, compressed
// or not.
func TestPreparedOnASocket(t *testing.T) {
	t.Parallel()
	f, err := Push("x", strings.Repeat("é", 40_000))
	require.NoError(t, err)
	received(t, f.Bytes(), func(ws *websocket.Conn) error {
		p, err := f.Prepared()
		return errors.Join(err, ws.WritePreparedMessage(p))
	})
}

// received checks the message that a client receives from write.
func received(t *testing.T, want []byte, write func(*websocket.Conn) error) {
	t.Helper()
	upgrader := websocket.Upgrader{EnableCompression: true}
	server := httptest.NewServer(http.HandlerFunc(func(rw http.ResponseWriter, r *http.Request) {
		ws, err := upgrader.Upgrade(rw, r, nil)
		if !assert.NoError(t, err) {
			return
		}
		defer ws.Close()
		assert.NoError(t, write(ws))
	}))
	defer server.Close()
	for _, compress := range []bool{false, true} {
		dialer := websocket.Dialer{EnableCompression: compress, NetDialContext: (&net.Dialer{}).DialContext}
		ws, _, err := dialer.DialContext(t.Context(), "ws"+strings.TrimPrefix(server.URL, "http"), nil)
		require.NoError(t, err)
		kind, got, err := ws.ReadMessage()
		require.NoError(t, err)
		assert.Equal(t, websocket.TextMessage, kind)
		assert.Equal(t, want, got)
		require.NoError(t, ws.Close())
	}
}

// Frames with the same long lists share them, and reach a client as one text message,
// compressed or not.
func TestFramesShareLongLists(t *testing.T) {
	t.Parallel()
	for _, size := range []int{10, sharedFrom, maxJoined, 300_000} {
		v := EncodedView{
			Success: true, Present: Text{fmt.Appendf(nil, `["%s"]`, strings.Repeat("é", size/2))}, States: []byte(`{"a":1}`),
			Extent: Extent{Total: CountOf(7), Epoch: "e", Seq: 3},
		}
		frames := make([]*Frame, 2)
		for i := range frames {
			f, err := Answer(strconv.Itoa(i), CommandSubscribePresence, v)
			require.NoError(t, err)
			want := fmt.Sprintf(`{"id":%d,"command":"mesh/subscribe-presence","payload":%s}`, i, v.AppendJSON(nil))
			assert.Equal(t, want, string(f.Bytes()))
			assert.Equal(t, len(want), f.Size())
			assert.Equal(t, size >= sharedFrom, f.rest != nil)
			frames[i] = f
		}
		if size >= sharedFrom {
			assert.Same(t, &v.Present[0][0], &frames[0].rest[0][0])
			assert.Same(t, &v.Present[0][0], &frames[1].rest[0][0])
		}
		received(t, frames[0].Bytes(), frames[0].Write)
	}
	none := EncodedView{States: bytes.Repeat([]byte("1"), sharedFrom)}
	f, err := Push("x", none)
	require.NoError(t, err)
	assert.Equal(t, `{"command":"x","payload":`+string(none.AppendJSON(nil))+`}`, string(f.Bytes()))
}

func BenchmarkUpdateFrame(b *testing.B) {
	state := json.RawMessage(`{"status":"typing","cursor":{"x":10.5,"y":200}}`)
	b.ReportAllocs()
	for b.Loop() {
		u := &Update{Type: UpdateState, ConnectionID: "01J9Z3V5Q8", RoomName: "lobby", Timestamp: 1732380000000, State: state, Seq: 42, Epoch: "f3a9"}
		u.Frame()
	}
}

func BenchmarkUpdateFramePrepared(b *testing.B) {
	b.ReportAllocs()
	for b.Loop() {
		u := &Update{Type: UpdateLeave, ConnectionID: "01J9Z3V5Q8", RoomName: "lobby", Timestamp: 1732380000000, Seq: 42, Epoch: "f3a9"}
		if _, err := u.Frame().Prepared(); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkAppendMembers(b *testing.B) {
	members := make([]Member, 1000)
	for i := range members {
		members[i] = Member{ID: "01J9Z3V5Q8", JoinedAt: 1732380000000, Metadata: json.RawMessage(`{"userId":"user123","username":"Alice","avatar":"https://example.com/avatar.png"}`)}
	}
	var buf []byte
	b.ReportAllocs()
	for b.Loop() {
		buf = AppendMembers(buf[:0], members)
	}
}
