package wire

import (
	"bytes"
	"encoding/json"
	"errors"
	"slices"
	"strings"
	"testing"
	"unicode/utf8"

	"github.com/stretchr/testify/require"
)

func FuzzDecode(f *testing.F) {
	for _, seed := range []string{
		`{"id":17,"command":"mesh/join-room","payload":{"roomName":"lobby"}}`,
		`{"command":"x","id":null}`, `{"c\u006fmmand":"\ud800"}`, `{"command":"x","payload":[[[]]]} `,
		`{"id":1e5,"command":"\\\"","a":{"command":1}}`, `{}`, `[]`, `{"command":"a","command":2}`, "{\"command\":\"\xff\"}",
	} {
		f.Add([]byte(seed))
	}
	f.Fuzz(func(t *testing.T, frame []byte) {
		before := bytes.Clone(frame)
		req, err := Decode(frame)
		require.Equal(t, before, frame, "the frame is not changed")
		want, ok := naiveDecode(frame)
		require.Equal(t, ok, err == nil)
		if err != nil {
			require.ErrorIs(t, err, ErrNotMesh)
			return
		}
		require.Equal(t, want.Command, req.Command)
		require.Equal(t, string(want.Payload), string(req.Payload))
		require.Equal(t, want.HasID, req.HasID)
		require.Equal(t, want.ID, req.ID)

		var payload any
		if req.Payload != nil {
			payload = req.Payload
		}
		answer, err := Answer(req.ID, req.Command, payload)
		require.NoError(t, err, "what was decoded can be encoded")
		again, err := Decode(answer.Bytes())
		require.NoError(t, err)
		require.Equal(t, req.ID, again.ID)
		require.Equal(t, req.Command, again.Command)
		_, err = answer.Prepared()
		require.NoError(t, err)
		for _, dst := range []any{new(RoomRequest), new(PublishStateRequest), new(SetMetadataRequest), new(GetMetadataRequest),
			new(JoinRequest), new(OccupancyRequest), new(ListPresenceRequest)} {
			if err := req.Bind(dst); err != nil {
				require.ErrorIs(t, err, ErrPayload)
			}
		}
	})
}

// FuzzUnmarshal compares requests with the result of JavaScript: a map tells names
// apart by case, and keeps the last of equal names.
func FuzzUnmarshal(f *testing.F) {
	for _, seed := range []string{
		`{"roomName":"lobby"}`, ` { "roomName" : "r\u00e9" , "roomName":"é" } `, `{"ROOMNAME":"x","roomName":"y"}`, `{"roomName":null}`, `{"roomName":1}`,
		`{"roomName":"y","ROOMNAME":"x"}`, `{"roomname":"x"}`, `{"roomName":1,"roomName":"y"}`, `{"roomName":"y","roomName":null}`, `{"roomN\u0061me":"x"}`,
		`{"roomName":"r","state":{"x":[1, 2]},"expireAfter":1.5e3,"silent":true}`, `{"state":null,"silent":null,"expireAfter":null}`,
		`{"expireAfter":1e999}`, `{"expireAfter":"1"}`, `{"silent":"t"}`, `{"silent":false,"more":0}`, `{"roomName":"\ud800"}`, `{}`, `[]`, `null`, `"x"`, `0`,
		`{"metadata":{"a":1},"options":{"strategy":"merge","STRATEGY":"x"}}`, `{"METADATA":1,"metadata":null,"options":null}`, `{"options":[]}`, `{"options":{"strategy":1}}`,
		`{"connectionId":"a","CONNECTIONID":"b","connectionId":"c"}`,
		`{"roomName":"a","replaces":"b"}`, `{"roomNames":["a","b",["c"]]}`, `{"roomNames":[ "a" ,"\u005d]\"" ]}`, `{"roomNames":[],"patch":true}`,
		`{"cursor":"a","limit":5}`, `{"cursor":{},"limit":[]}`, `{"roomNames":[{"a":[1]},"b"]}`,
	} {
		f.Add([]byte(seed))
	}
	f.Fuzz(func(t *testing.T, payload []byte) {
		if !Valid(payload) { // Decode rejects such payloads
			return
		}
		var object map[string]any
		err := json.Unmarshal(payload, &object)
		if _, tooLarge := errors.AsType[*json.UnmarshalTypeError](err); tooLarge && IsObject(payload) {
			return // a number that does not fit a float
		}
		var room RoomRequest
		var state PublishStateRequest
		var set SetMetadataRequest
		var get GetMetadataRequest
		var join JoinRequest
		var occupancy OccupancyRequest
		var list ListPresenceRequest
		for dst, same := range map[any]func() bool{
			&room: func() bool { return reads(object["roomName"], room.RoomName) },
			&get:  func() bool { return reads(object["connectionId"], get.ConnectionID) },
			&state: func() bool {
				return reads(object["roomName"], state.RoomName) && state.Silent == (object["silent"] == true) &&
					state.Patch == (object["patch"] == true)
			},
			&join: func() bool {
				return reads(object["roomName"], join.RoomName) && reads(object["replaces"], join.Replaces)
			},
			&occupancy: func() bool {
				names, _ := object["roomNames"].([]any)
				return slices.EqualFunc(names, occupancy.RoomNames, reads)
			},
			&list: func() bool {
				limit, ok := object["limit"].(float64)
				return reads(object["cursor"], list.Cursor) && ok == (list.Limit != nil) && (!ok || limit == *list.Limit)
			},
			&set: func() bool {
				options, _ := object["options"].(map[string]any)
				return reads(options["strategy"], Name(set.Options.Strategy))
			},
		} {
			got := Unmarshal(payload, dst)
			if err != nil { // not an object
				require.Error(t, got)
			}
			if got == nil {
				require.True(t, same(), "%T %q", dst, payload)
				continue
			}
			for _, word := range []string{"json:", "Go ", "wire.", "struct", "float64", "unmarshal"} {
				require.NotContains(t, got.Error(), word)
			}
		}
	})
}

// reads reports whether name is the result of decoding value.
func reads(value any, name Name) bool {
	text, _ := value.(string)
	return text == string(name)
}

// naiveDecode is Decode with a map, which unlike a struct tells names apart by case.
func naiveDecode(frame []byte) (Request, bool) {
	var object map[string]json.RawMessage
	if !utf8.Valid(frame) || json.Unmarshal(frame, &object) != nil || object == nil || depth(frame) > MaxDepth {
		return Request{}, false
	}
	var command any
	if json.Unmarshal(object["command"], &command) != nil {
		return Request{}, false
	}
	req := Request{Payload: object["payload"]}
	var isText bool
	req.Command, isText = command.(string)
	var id json.Number
	if raw := object["id"]; len(raw) > 0 && raw[0] != '"' && json.Unmarshal(raw, &id) == nil && id != "" {
		req.ID, req.HasID = string(raw), true
	}
	return req, isText
}

// depth returns the nesting depth of valid JSON.
func depth(raw []byte) (deepest int) {
	dec := json.NewDecoder(bytes.NewReader(raw))
	dec.UseNumber()
	for now := 0; ; {
		token, err := dec.Token()
		if err != nil {
			return deepest
		}
		if d, ok := token.(json.Delim); ok {
			if d == '{' || d == '[' {
				now++
			} else {
				now--
			}
			deepest = max(deepest, now)
		}
	}
}

// plainUpdate is an Update for encoding/json.
type plainUpdate struct {
	Type            string           `json:"type"`
	ConnectionID    string           `json:"connectionId"`
	RoomName        string           `json:"roomName"`
	Timestamp       int64            `json:"timestamp"`
	UserID          string           `json:"userId,omitempty"`
	UserConnections *int             `json:"userConnections,omitempty"`
	JoinedAt        int64            `json:"joinedAt,omitempty"`
	Metadata        *json.RawMessage `json:"metadata,omitempty"`
	State           *json.RawMessage `json:"state,omitempty"`
	Reason          *string          `json:"reason,omitempty"`
	Replaces        string           `json:"replaces,omitempty"`
	Connections     *int             `json:"connections,omitempty"`
	Users           *int             `json:"users,omitempty"`
	Seq             uint64           `json:"seq"`
	Epoch           string           `json:"epoch"`
	Repair          bool             `json:"repair,omitempty"`
}

// plain returns the update as encoding/json is to encode it.
func plain(u *Update) plainUpdate {
	p := plainUpdate{
		Type: u.Type, ConnectionID: u.ConnectionID, RoomName: u.RoomName, Timestamp: u.Timestamp, Seq: u.Seq, Epoch: u.Epoch, Repair: u.Repair,
	}
	orNull := func(raw json.RawMessage) *json.RawMessage {
		if raw == nil {
			raw = json.RawMessage("null")
		}
		return &raw
	}
	switch u.Type {
	case UpdateState:
		p.State = orNull(u.State)
	case UpdateMetadata:
		p.Metadata = orNull(u.Metadata)
	case UpdateDisconnect, UpdateLeave:
		p.Reason = &u.Reason
	case UpdateJoin:
		p.Replaces = u.Replaces
		if u.Metadata != nil {
			p.Metadata = &u.Metadata
		}
	}
	entry := u.Type == UpdateJoin || u.Type == UpdateLeave
	if entry {
		p.JoinedAt = u.JoinedAt
	}
	if entry || u.Type == UpdateMetadata && u.NewUser {
		if p.UserID = u.UserID; p.UserID != "" {
			p.UserConnections = &u.UserConnections
		}
		if n, ok := u.Connections.Get(); ok {
			p.Connections = &n
		}
		if n, ok := u.Users.Get(); ok {
			p.Users = &n
		}
	}
	return p
}

func FuzzUpdate(f *testing.F) {
	add := func(kind byte, conn, room string, at int64, meta, state []byte, seq uint64, epoch string, repair bool) {
		f.Add(kind, conn, room, at, meta, state, seq, epoch, repair, "ann", "lost", "c0", 2, uint16(3), uint16(0), true)
		f.Add(kind, conn, room, at, meta, state, seq, epoch, repair, "", "\x00", "", 0, uint16(0), uint16(1), false)
	}
	for kind := range byte(6) {
		add(kind, "c", "lobby", int64(1), []byte(`{"a":1}`), []byte(nil), uint64(1), "e", false)
		add(kind, "\x00\"\\\n", "r\u2028<&>\xff", int64(-1), []byte(nil), []byte(nil), uint64(0), "", true)
		add(kind, "\x7f\x1f\t\r", "\xed\xa0\x80é\xc3", int64(0), []byte(`{`), []byte(`1e400`), uint64(9), "\ufffd", false)
		add(kind, "0", "0", int64(1), []byte(`0`), bytes.Repeat([]byte{0xf8}, 400), uint64(1), "0", false)
	}
	f.Fuzz(func(t *testing.T, kind byte, conn, room string, at int64, meta, state []byte, seq uint64, epoch string, repair bool,
		user, reason, replaces string, ofUser int, connections, users uint16, newUser bool) {
		if !Valid(meta) { // the hub validates metadata
			meta = nil
		}
		if !Valid(state) {
			state = nil
		}
		u := &Update{
			Type:         []string{UpdateJoin, UpdateLeave, UpdateState, UpdateMetadata, UpdateDisconnect, UpdateReconnect}[kind%6],
			ConnectionID: conn, RoomName: room, Timestamp: at, Metadata: meta, State: state, Seq: seq, Epoch: epoch, Repair: repair,
			UserID: user, JoinedAt: at, Reason: reason, Replaces: replaces, UserConnections: ofUser, NewUser: newUser,
			Numbers: Numbers{Count{int(connections)}, Count{int(users)}},
		}
		want, err := json.Marshal(map[string]any{"command": PushPresenceUpdate, "payload": plain(u)})
		require.NoError(t, err)
		got := u.Frame().Bytes()
		require.True(t, json.Valid(got) && utf8.Valid(got), "%q", got)
		require.Equal(t, parse(t, want), parse(t, got))
	})
}

// parse decodes JSON and keeps the digits of numbers.
func parse(t *testing.T, raw []byte) (v any) {
	t.Helper()
	dec := json.NewDecoder(bytes.NewReader(raw))
	dec.UseNumber()
	require.NoError(t, dec.Decode(&v))
	return v
}

func FuzzMergeMetadata(f *testing.F) {
	f.Add([]byte(`{"a":1,"o":{"x":1,"y":[1]}}`), []byte(`{"o":{"y":{"z":null}},"b":1.50}`))
	f.Add([]byte(`{"a":1,"a":{}}`), []byte(` { "\u0061" : { } , "" : {"":{}} } `))
	f.Add([]byte(`[]`), []byte(`null`))
	f.Add([]byte(``), []byte(`{`))
	f.Add([]byte(strings.Repeat(`{"a":`, 70)+`1`+strings.Repeat(`}`, 70)), []byte(strings.Repeat(`{"a":`, 66)+`1`+strings.Repeat(`}`, 66)))
	f.Fuzz(func(t *testing.T, current, change []byte) {
		for _, strategy := range []Strategy{"", StrategyReplace, StrategyMerge, StrategyDeepMerge} {
			got, err := MergeMetadata(current, change, strategy)
			if CheckValue(change) != nil {
				require.Error(t, err)
				continue
			}
			if errors.Is(err, ErrTooDeep) {
				require.Equal(t, StrategyDeepMerge, strategy)
				require.Greater(t, min(depth(current), depth(change)), MaxMergeDepth)
				continue
			}
			require.NoError(t, err)
			require.NoError(t, CheckValue(got))
			want := parse(t, change)
			if CheckValue(current) == nil {
				want = naiveMerge(parse(t, current), want, strategy)
			}
			require.Equal(t, want, parse(t, got), "%s", strategy)
		}
	})
}

// naiveMerge is MergeMetadata on decoded values.
func naiveMerge(current, change any, strategy Strategy) any {
	a, okA := current.(map[string]any)
	b, okB := change.(map[string]any)
	if !okA || !okB || strategy == "" || strategy == StrategyReplace {
		return change
	}
	for key, value := range b {
		if strategy == StrategyDeepMerge {
			value = naiveMerge(a[key], value, strategy)
		}
		a[key] = value
	}
	return a
}
