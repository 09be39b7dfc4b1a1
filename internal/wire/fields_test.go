package wire

import (
	"encoding/json"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

// TestFieldNamesMatchExactly checks that names differ by case, and that the last of equal
// names counts, whatever the earlier ones contain.
func TestFieldNamesMatchExactly(t *testing.T) {
	t.Parallel()
	for payload, want := range map[string]Name{
		`{"roomName":"a"}`:                     "a",
		`{"ROOMNAME":"a"}`:                     "",
		`{"roomname":"a","RoomName":"b"}`:      "",
		`{"roomName":"a","ROOMNAME":"b"}`:      "a",
		`{"roomName":"a","roomName":"b"}`:      "b",
		`{"roomName":1,"roomName":"b"}`:        "b",
		`{"roomName":"a","roomName":null}`:     "",
		`{"room\u004eame":"a"}`:                "a",
		`{"roomName":"\u00e9"}`:                "é",
		`{"x":{"roomName":"a"}}`:               "",
		`null`:                                 "",
		``:                                     "",
		` { "roomName" : "a" , "other" : [] }`: "a",
	} {
		var r RoomRequest
		require.NoError(t, Unmarshal(json.RawMessage(payload), &r), payload)
		assert.Equal(t, want, r.RoomName, payload)
	}

	var p PublishStateRequest
	require.NoError(t, Unmarshal(json.RawMessage(
		`{"roomName":"a","state":{"n":1},"STATE":{},"expireAfter":5,"ExpireAfter":7,"silent":true,"SILENT":false}`), &p))
	assert.Equal(t, `{"n":1}`, string(p.State))
	assert.InEpsilon(t, 5.0, *p.ExpireAfter, 0)
	assert.True(t, p.Silent)
	require.NoError(t, Unmarshal(json.RawMessage(`{"expireafter":5,"Silent":true,"State":{}}`), &p))
	assert.Equal(t, PublishStateRequest{}, p)

	require.NoError(t, Unmarshal(json.RawMessage(`{"patch":true,"Patch":false,"PATCH":1}`), &p))
	assert.Equal(t, PublishStateRequest{Patch: true}, p)

	var j JoinRequest
	require.NoError(t, Unmarshal(json.RawMessage(`{"roomName":"a","replaces":"c1","Replaces":2,"ROOMNAME":"b"}`), &j))
	assert.Equal(t, JoinRequest{"a", "c1"}, j)
	require.NoError(t, Unmarshal(json.RawMessage(`{"roomName":"a","replaces":null,"REPLACES":"c1"}`), &j))
	assert.Equal(t, JoinRequest{RoomName: "a"}, j)

	var o OccupancyRequest
	require.NoError(t, Unmarshal(json.RawMessage(`{"roomNames":[ "a" , "b\u00e9,\"]", "a"],"RoomNames":["c"]}`), &o))
	assert.Equal(t, []Name{"a", `bé,"]`, "a"}, o.RoomNames)
	for _, none := range []string{`{"ROOMNAMES":["c"]}`, `{"roomNames":null}`, `{"roomNames":[ ]}`, `{"roomNames":["a"],"roomNames":[]}`} {
		require.NoError(t, Unmarshal(json.RawMessage(none), &o))
		assert.Empty(t, o.RoomNames, none)
	}

	var l ListPresenceRequest
	require.NoError(t, Unmarshal(json.RawMessage(`{"roomName":"a","cursor":"x","limit":7,"Limit":8,"CURSOR":"y"}`), &l))
	assert.Equal(t, Name("x"), l.Cursor)
	size, err := l.Size()
	require.NoError(t, err)
	assert.Equal(t, 7, size)
	require.NoError(t, Unmarshal(json.RawMessage(`{"LIMIT":8}`), &l))
	assert.Equal(t, ListPresenceRequest{}, l)

	var s SetMetadataRequest
	require.NoError(t, Unmarshal(json.RawMessage(`{"Metadata":1,"metadata":2,"OPTIONS":{},"options":{"Strategy":"x","strategy":"merge"}}`), &s))
	assert.Equal(t, "2", string(s.Metadata))
	assert.Equal(t, StrategyMerge, s.Options.Strategy)

	got := Fields([]byte(`{"a":1,"B":2,"b":3,"a":4,"c":null}`), "a", "b", "c", "d")
	assert.Equal(t, []json.RawMessage{json.RawMessage("4"), json.RawMessage("3"), nil, nil}, got)
}

// TestErrorsNameTheField checks that errors use the words of the client and none of Go.
func TestErrorsNameTheField(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		dst           any
		payload, want string
	}{
		{&RoomRequest{}, `{"roomName":1}`, "roomName must be a string"},
		{&RoomRequest{}, `{"roomName":{"a":"b"}}`, "roomName must be a string"},
		{&RoomRequest{}, `{"roomName":"\ud800"}`, "roomName holds half of a surrogate pair"},
		{&RoomRequest{}, `[]`, "payload must be an object"},
		{&RoomRequest{}, `"lobby"`, "payload must be an object"},
		{&RoomRequest{}, `0`, "payload must be an object"},
		{&GetMetadataRequest{}, `{"connectionId":[]}`, "connectionId must be a string"},
		{&PublishStateRequest{}, `{"roomName":false}`, "roomName must be a string"},
		{&PublishStateRequest{}, `{"expireAfter":"5"}`, "expireAfter must be a number"},
		{&PublishStateRequest{}, `{"silent":1}`, "silent must be true or false"},
		{&PublishStateRequest{}, `{"patch":"yes"}`, "patch must be true or false"},
		{&JoinRequest{}, `{"roomName":1}`, "roomName must be a string"},
		{&JoinRequest{}, `{"replaces":[]}`, "replaces must be a string"},
		{&JoinRequest{}, `{"replaces":"\udc00"}`, "replaces holds half of a surrogate pair"},
		{&OccupancyRequest{}, `{"roomNames":"a"}`, "roomNames must be an array of strings"},
		{&OccupancyRequest{}, `{"roomNames":{"0":"a"}}`, "roomNames must be an array of strings"},
		{&OccupancyRequest{}, `{"roomNames":["a",null]}`, "roomNames must be an array of strings"},
		{&OccupancyRequest{}, `{"roomNames":[["a"]]}`, "roomNames must be an array of strings"},
		{&OccupancyRequest{}, `{"roomNames":["a","\ud800"]}`, "roomNames holds half of a surrogate pair"},
		{&ListPresenceRequest{}, `{"roomName":1}`, "roomName must be a string"},
		{&ListPresenceRequest{}, `{"cursor":1}`, "cursor must be a string"},
		{&ListPresenceRequest{}, `{"limit":"1"}`, "limit must be a number"},
		{&SetMetadataRequest{}, `{"options":"merge"}`, "options must be an object"},
		{&SetMetadataRequest{}, `{"options":{"strategy":1}}`, "options.strategy must be a string"},
	} {
		assert.EqualError(t, Unmarshal(json.RawMessage(c.payload), c.dst), c.want, c.payload)
	}
	var p PublishStateRequest
	require.NoError(t, Unmarshal(json.RawMessage(`{"expireAfter":1e999}`), &p))
	_, err := p.Expiry()
	require.EqualError(t, err, "mesh: invalid payload: expireAfter is too large")
	require.NoError(t, Unmarshal(json.RawMessage(`{"expireAfter":-1e999}`), &p))
	expiry, err := p.Expiry()
	require.NoError(t, err, "as other negative numbers")
	assert.Zero(t, expiry)
}

func TestListSize(t *testing.T) {
	t.Parallel()
	for payload, want := range map[string]int{
		`{}`: 100, `{"limit":null}`: 100, `{"limit":1}`: 1, `{"limit":1e3}`: 1000, `{"limit":7.0}`: 7,
		`{"limit":0}`: 0, `{"limit":-1}`: 0, `{"limit":1001}`: 0, `{"limit":1.5}`: 0, `{"limit":1e999}`: 0,
	} {
		var r ListPresenceRequest
		require.NoError(t, Unmarshal(json.RawMessage(payload), &r))
		got, err := r.Size()
		assert.Equal(t, want, got, payload)
		if want == 0 {
			require.EqualError(t, err, "mesh: invalid payload: limit must be a whole number from 1 to 1000", payload)
			require.ErrorIs(t, err, ErrPayload)
		} else {
			require.NoError(t, err)
		}
	}
}
