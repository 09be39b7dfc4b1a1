package load

import (
	"fmt"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
)

func TestLedger(t *testing.T) {
	t.Parallel()
	update := func(kind, conn, room string, seq int, epoch string) string {
		more := map[string]string{"join": `"metadata":{"seq":1},`, "state": `"state":{"x":1},`}[kind]
		return fmt.Sprintf(`{"command":"mesh/presence-update","payload":{"type":%q,"connectionId":%q,"roomName":%q,"timestamp":1,%s"seq":%d,"epoch":%q}}`,
			kind, conn, room, more, seq, epoch)
	}
	for name, c := range map[string]struct {
		frames []string
		broken string // error of the last frame
	}{
		"in order":             {frames: []string{update("join", "b", "r", 6, "e"), update("state", "b", "r", 7, "e"), update("leave", "a", "r", 8, "e")}},
		"again after a leave":  {frames: []string{update("leave", "a", "r", 6, "e"), update("join", "a", "r", 7, "e")}},
		"another room":         {frames: []string{update("join", "a", "other", 1, "e")}},
		"another epoch":        {frames: []string{update("join", "b", "r", 1, "f")}},
		"joins twice":          {frames: []string{update("join", "a", "r", 6, "e")}, broken: "joined twice"},
		"leaves twice":         {frames: []string{update("leave", "a", "r", 6, "e"), update("leave", "a", "r", 7, "e")}, broken: "leave of a connection that is not a member"},
		"state of the absent":  {frames: []string{update("state", "b", "r", 6, "e")}, broken: "state of a connection that is not a member"},
		"seq before snapshot":  {frames: []string{update("join", "b", "r", 4, "e")}, broken: "seq decreases"},
		"seq before the last":  {frames: []string{update("join", "b", "r", 9, "e"), update("leave", "b", "r", 8, "e")}, broken: "seq decreases"},
		"what is not readable": {frames: []string{`{"command":"mesh/presence-update","payload":{"roomName":"r"}}`}, broken: "no seq"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			l, err := NewLedger("r", []byte(`{"success":true,"present":[{"id":"a","metadata":null}],"states":{},"seq":5,"epoch":"e"}`))
			require.NoError(t, err)
			for i, frame := range c.frames {
				err := l.Apply([]byte(frame))
				if i < len(c.frames)-1 || c.broken == "" {
					require.NoError(t, err)
				} else {
					require.ErrorContains(t, err, c.broken)
				}
			}
		})
	}
	_, err := NewLedger("r", []byte(`{"success":false,"present":[]}`))
	require.Error(t, err)
	_, err = NewLedger("r", []byte(strings.Repeat("x", 10)))
	require.Error(t, err)
}
