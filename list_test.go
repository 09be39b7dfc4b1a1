package mesh_test

import (
	"encoding/base64"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/meshpresence/mesh"
	"github.com/meshpresence/mesh/internal/wire"
)

// FuzzListCursor parses cursors, which come from clients. An accepted cursor stays the same
// when it is encoded and parsed again.
func FuzzListCursor(f *testing.F) {
	for _, text := range []string{"", "r1x.zz.", "r1x.0.some.conn", "ABCDEFGHIJ.1.17", "ABC.1.0", "A.-1.1", ".1.1", "r", "..", "A.1.99999999999999999999"} {
		f.Add(base64.RawURLEncoding.EncodeToString([]byte(text)))
	}
	f.Add("no base64!")
	f.Fuzz(func(t *testing.T, text string) {
		again, err := mesh.ReparseListCursor(text)
		if err != nil {
			require.ErrorIs(t, err, wire.ErrPayload)
			return
		}
		if text == "" {
			return
		}
		twice, err := mesh.ReparseListCursor(again)
		require.NoError(t, err)
		require.Equal(t, again, twice)
	})
}
