package api

import (
	"fmt"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/meshpresence/mesh"
	"github.com/meshpresence/mesh/internal/e2e/harness"
)

// A server that was declared dead may have missed rechecks. It asks the guards before
// it delivers the updates that it missed.
func TestACutOffServerAsksGuardsBeforeItDelivers(t *testing.T) {
	t.Parallel()
	for i := range 6 {
		t.Run(fmt.Sprint(i), func(t *testing.T) {
			t.Parallel()
			harness.Embedded(t, func(t *testing.T, w *harness.World) {
				rights := &harness.Register{}
				there := w.Server()
				here, line := w.Mortal()
				for _, s := range []*harness.Server{here, there} {
					s.Track(".*", mesh.PresenceOptions{Guard: rights.Guard})
				}
				p, busy := here.Dial(), there.Dial()
				busy.Join("doc")
				p.Subscribe("doc")
				line.Cut()
				w.Sleep(15 * time.Second)
				rights.Set(p.ID, false)
				require.NoError(t, there.Rooms().Recheck(t.Context(), "doc"))
				require.Equal(t, "true", busy.State("doc", map[string]any{"secret": true}))
				w.Sleep(time.Duration(i) * 29 * time.Millisecond)
				line.Mend()
				w.Sleep(15 * time.Second)
				assert.Equal(t, 1, p.Pushed("mesh/presence-ended"))
				assert.Zero(t, p.Count("state", busy.ID))
			})
		})
	}
}
