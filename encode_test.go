package mesh

import (
	"encoding/json"
	"testing"
	"unicode/utf8"

	"github.com/stretchr/testify/require"

	"github.com/meshpresence/mesh/meshtest"
)

// FuzzStates holds what is taken for a state or metadata against encoding/json:
// the same value, in valid JSON, that taken again stays as it is.
func FuzzStates(f *testing.F) {
	for _, s := range []string{`{}`, ` { "a" : [ 1.50 , "\ud800" ] } `, `null`, ` null `, `[]`, `{"a":1,"a":2}`, `1e999`, "{\"\xff\":1}", `{"a":"` + "\u2028" + `"}`} {
		f.Add([]byte(s))
	}
	r := meshtest.StartRedis(f)
	n, err := newCore(Options{Redis: r.Client()}, sockets{})
	require.NoError(f, err)
	f.Cleanup(n.life.end)
	f.Fuzz(func(t *testing.T, raw []byte) {
		state, err := n.encodeState(json.RawMessage(raw))
		metadata, metaErr := n.encodeMetadata(json.RawMessage(raw))
		if err == nil {
			require.NoError(t, metaErr, "metadata may be anything that a state may be, and larger")
			require.Equal(t, string(metadata), string(state))
			require.Equal(t, byte('{'), state[0])
		} else {
			_, code, _ := wireError(err)
			require.Contains(t, []string{"EINVALID", "ETOOLARGE"}, code)
		}
		if metaErr != nil || metadata == nil {
			return
		}
		require.True(t, utf8.Valid(metadata) && json.Valid(metadata))
		again, err := n.encodeMetadata(metadata)
		require.NoError(t, err)
		require.Equal(t, string(metadata), string(again))
		var one, two any
		if json.Unmarshal(raw, &one) == nil { // but for numbers that fit no float
			require.NoError(t, json.Unmarshal(metadata, &two))
			require.Equal(t, one, two)
		}
	})
}
