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
