package peers

import (
	"encoding/json"
	"errors"
	"fmt"
	"reflect"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/meshpresence/mesh/internal/errs"
)

// Messages between servers are read like those of clients.
func TestServersReadNamesAsWritten(t *testing.T) {
	t.Parallel()
	call, ok := readCall(`{"ID":"x","id":"1","op":"add","OP":"clear","from":"a","from":"b","room":"r","conn":null}`)
	require.True(t, ok)
	assert.Equal(t, Call{ID: "1", From: "b", Op: "add", Room: "r"}, call)
	got, ok := readAnswer(`{"id":"1","OK":true,"ok":false,"rooms":["a"],"Error":"limit"}`)
	require.True(t, ok)
	assert.Equal(t, answer{ID: "1", Result: Result{Rooms: []string{"a"}}}, got)
	f, ok := readFrame(`{"conn":"c","Room":"r","command":"x","payload":{"a":1}}`)
	require.True(t, ok)
	assert.Equal(t, Frame{Conn: "c", Command: "x", Payload: json.RawMessage(`{"a":1}`)}, f)
	for _, bad := range []string{``, `null`, `[]`, `{"id":1}`, `{`, `{"ok":"yes"}`, "{\"id\":\"\xff\"}"} {
		_, callOK := readCall(bad)
		_, answerOK := readAnswer(bad)
		assert.False(t, callOK && answerOK, bad)
	}
}

// Each field of a message arrives.
func TestServersReadEveryField(t *testing.T) {
	t.Parallel()
	call := Call{
		ID: "1", From: "a", Op: "clear", Room: "r", Conn: "c", Conns: []string{"d"}, Paged: true, After: "e",
		OverCap: true, Position: "x 1 y",
	}
	want := answer{
		ID: "1", Result: Result{OK: true, Rooms: []string{"r"}, Gone: []string{"c"}, Count: 7, After: "e", Full: "2 users"}, Error: "limit",
	}
	frame := Frame{Conn: "c", Room: "r", Command: "x", Payload: json.RawMessage(`1`)}
	for _, message := range []any{call, want.Result, frame} {
		v := reflect.ValueOf(message)
		for i := range v.NumField() {
			assert.False(t, v.Field(i).IsZero(), "%T.%s is to be set here", message, v.Type().Field(i).Name)
		}
	}
	text := func(message any) string {
		b, err := json.Marshal(message)
		require.NoError(t, err)
		return string(b)
	}
	gotCall, ok := readCall(text(call))
	assert.True(t, ok)
	assert.Equal(t, call, gotCall)
	gotAnswer, ok := readAnswer(text(want))
	assert.True(t, ok)
	assert.Equal(t, want, gotAnswer)
	gotFrame, ok := readFrame(text(frame))
	assert.True(t, ok)
	assert.Equal(t, frame, gotFrame)
}

// The errors of an answer arrive as the same errors, and all others as ErrUnavailable.
func TestErrorsOfAnswers(t *testing.T) {
	t.Parallel()
	for _, e := range remoteErrors {
		wrapped := fmt.Errorf("%w: c1", e.err)
		assert.Equal(t, e.name, nameOfError(wrapped))
		assert.Equal(t, e.err, answer{Error: nameOfError(wrapped)}.err())
	}
	assert.Equal(t, "unavailable", nameOfError(errors.New("odd")))
	assert.ErrorIs(t, answer{Error: "of a newer server"}.err(), errs.Unavailable)
	assert.NoError(t, answer{}.err())
}
