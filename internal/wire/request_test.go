package wire

import (
	"encoding/json"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

func TestDecode(t *testing.T) {
	t.Parallel()
	nested := func(n int) string { return strings.Repeat("[", n) + strings.Repeat("]", n) }
	tests := []struct {
		name  string
		frame string
		want  Request
		err   bool
	}{
		{"request", `{"id":17,"command":"mesh/join-room","payload":{"roomName":"lobby"}}`,
			Request{"17", true, CommandJoinRoom, json.RawMessage(`{"roomName":"lobby"}`), 0, nil}, false},
		{"spaces", " {\t\"payload\" : [ 1 , 2 ] ,\r\n \"command\" : \"x\" , \"id\" : 0 } ",
			Request{"0", true, "x", json.RawMessage(`[ 1 , 2 ]`), 0, nil}, false},
		{"no id", `{"command":"x"}`, Request{Command: "x"}, false},
		{"id is null", `{"id":null,"command":"x"}`, Request{Command: "x"}, false},
		{"id is a string", `{"id":"1","command":"x"}`, Request{Command: "x"}, false},
		{"id is an object", `{"id":{"id":1},"command":"x"}`, Request{Command: "x"}, false},
		{"id keeps its digits", `{"id":-1.50e+3,"command":"x"}`, Request{"-1.50e+3", true, "x", nil, 0, nil}, false},
		{"payload is null", `{"command":"x","payload":null}`, Request{Command: "x", Payload: json.RawMessage(`null`)}, false},
		{"last name counts", `{"id":1,"command":"x","id":2,"command":"y"}`, Request{"2", true, "y", nil, 0, nil}, false},
		{"escaped name", `{"c\u006fmmand":"a\"\u00e9"}`, Request{Command: `a"é`}, false},
		{"names inside strings and objects", `{"a":"\"command\":\"q\\\"","b":{"command":"z","id":3},"command":"x"}`, Request{Command: "x"}, false},
		{"unknown names", `{"command":"x","trace":[{}]}`, Request{Command: "x"}, false},
		{"deep", `{"command":"x","payload":` + nested(MaxDepth-1) + `}`, Request{Command: "x", Payload: json.RawMessage(nested(MaxDepth - 1))}, false},
		{"brackets in strings", `{"command":"x","payload":"` + strings.Repeat("[", 2*MaxDepth) + `"}`,
			Request{Command: "x", Payload: json.RawMessage(`"` + strings.Repeat("[", 2*MaxDepth) + `"`)}, false},
		{"wide", `{"command":"x","payload":[[]` + strings.Repeat(",[]", 2*MaxDepth) + `]}`,
			Request{Command: "x", Payload: json.RawMessage(`[[]` + strings.Repeat(",[]", 2*MaxDepth) + `]`)}, false},

		{"too deep", `{"command":"x","payload":` + nested(MaxDepth) + `}`, Request{}, true},
		{"depth bomb", strings.Repeat(`{"command":`, 1_000_000), Request{}, true},
		{"closed depth bomb", `{"command":"x","payload":` + nested(1_000_000) + `}`, Request{}, true},
		{"empty", "", Request{}, true},
		{"blank", " \n", Request{}, true},
		{"text", "hello", Request{}, true},
		{"array", `[{"command":"x"}]`, Request{}, true},
		{"null", `null`, Request{}, true},
		{"no command", `{"id":1}`, Request{}, true},
		{"empty command", `{"id":1,"command":""}`, Request{ID: "1", HasID: true}, false},
		{"command is a number", `{"command":1}`, Request{}, true},
		{"command is null", `{"command":null}`, Request{}, true},
		{"command in capitals", `{"Command":"x"}`, Request{}, true},
		{"cut off", `{"command":"x"`, Request{}, true},
		{"two values", `{"command":"x"}{}`, Request{}, true},
		{"trailing comma", `{"command":"x",}`, Request{}, true},
		{"not UTF-8", "{\"command\":\"x\",\"payload\":\"\xff\"}", Request{}, true},
		{"byte order mark", "\ufeff{\"command\":\"x\"}", Request{}, true},
		{"no-break space", "\u00a0{\"command\":\"x\"}", Request{}, true},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			got, err := Decode([]byte(test.frame))
			if test.err {
				require.ErrorIs(t, err, ErrNotMesh)
				assert.Zero(t, got)
				return
			}
			require.NoError(t, err)
			test.want.Size = len(test.frame)
			assert.Equal(t, test.want, got)
		})
	}
}

func TestDecodeAllocatesOnlyTheID(t *testing.T) {
	frame := []byte(`{"id":4711,"command":"mesh/join-room","payload":{"roomName":"lobby"}}`)
	allocs := testing.AllocsPerRun(100, func() { _, _ = Decode(frame) })
	assert.LessOrEqual(t, allocs, 1.0)
}

func TestBind(t *testing.T) {
	t.Parallel()
	var publish PublishStateRequest
	req := Request{Command: CommandPublishPresenceState,
		Payload: json.RawMessage(`{"roomName":"r\u00e9","state":{"n":12345678901234567890.10},"expireAfter":1500.2,"silent":true}`)}
	require.NoError(t, req.Bind(&publish))
	assert.Equal(t, Name("ré"), publish.RoomName)
	assert.Equal(t, `{"n":12345678901234567890.10}`, string(publish.State), "numbers keep their digits")
	assert.True(t, publish.Silent)
	expiry, err := publish.Expiry()
	require.NoError(t, err)
	assert.Equal(t, 1501*time.Millisecond, expiry)

	var set SetMetadataRequest
	req = Request{Payload: json.RawMessage(`{"metadata":null,"options":{"strategy":"deepMerge"}}`)}
	require.NoError(t, req.Bind(&set))
	assert.Equal(t, "null", string(set.Metadata), "null is not the same as missing")
	assert.Equal(t, StrategyDeepMerge, set.Options.Strategy)

	var join RoomRequest
	require.NoError(t, (&Request{}).Bind(&join), "no payload")
	assert.Zero(t, join)
	for _, payload := range []string{`{"roomName":1}`, `[]`, `"lobby"`, `1`} {
		req := Request{Command: CommandJoinRoom, Payload: json.RawMessage(payload)}
		require.ErrorIs(t, req.Bind(&join), ErrPayload, payload)
	}
}

func TestExpiry(t *testing.T) {
	t.Parallel()
	tests := []struct {
		payload string
		want    time.Duration
		err     bool
	}{
		{`{}`, 0, false},
		{`{"expireAfter":null}`, 0, false},
		{`{"expireAfter":0}`, 0, false},
		{`{"expireAfter":-5}`, 0, false},
		{`{"expireAfter":0.001}`, time.Millisecond, false},
		{`{"expireAfter":3e3}`, 3 * time.Second, false},
		{`{"expireAfter":9007199254740991}`, 0, true},
		{`{"expireAfter":1e300}`, 0, true},
		{`{"expireAfter":9223372036853}`, 9223372036853 * time.Millisecond, false},
		{`{"expireAfter":9223372036854}`, 0, true},
	}
	for _, test := range tests {
		var r PublishStateRequest
		require.NoError(t, json.Unmarshal([]byte(test.payload), &r))
		got, err := r.Expiry()
		if test.err {
			require.ErrorIs(t, err, ErrPayload, test.payload)
			continue
		}
		require.NoError(t, err, test.payload)
		assert.Equal(t, test.want, got, test.payload)
	}
}

func TestCheckValue(t *testing.T) {
	t.Parallel()
	for _, good := range []string{`null`, ` 1 `, `{"a":[1]}`, `"é"`} {
		require.NoError(t, CheckValue([]byte(good)), good)
	}
	for _, bad := range []string{``, `nul`, `{`, `1 2`, "\"\xc3\"", "\"\n\""} {
		require.ErrorIs(t, CheckValue([]byte(bad)), ErrNotJSON, bad)
	}
	deep := strings.Repeat("[", MaxDepth) + strings.Repeat("]", MaxDepth)
	require.NoError(t, CheckValue([]byte(deep)))
	require.ErrorIs(t, CheckValue([]byte("["+deep+"]")), ErrTooDeep)

	for raw, want := range map[string]bool{``: true, ` null `: true, `0`: false, `{}`: false, `"null"`: false} {
		assert.Equal(t, want, isNull(json.RawMessage(raw)), raw)
	}
	for raw, want := range map[string]bool{``: false, `null`: false, ` {} `: true, `[{}]`: false} {
		assert.Equal(t, want, IsObject(json.RawMessage(raw)), raw)
	}
}

func BenchmarkDecode(b *testing.B) {
	for name, frame := range map[string]string{
		"join":  `{"id":4711,"command":"mesh/join-room","payload":{"roomName":"lobby"}}`,
		"state": `{"id":4711,"command":"mesh/publish-presence-state","payload":{"roomName":"lobby","state":{"status":"typing","cursor":{"x":10.5,"y":200}},"expireAfter":5000}}`,
		"pong":  `{"id":4711,"command":"pong","payload":{}}`,
	} {
		b.Run(name, func(b *testing.B) {
			data := []byte(frame)
			b.SetBytes(int64(len(data)))
			b.ReportAllocs()
			for b.Loop() {
				if _, err := Decode(data); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}
