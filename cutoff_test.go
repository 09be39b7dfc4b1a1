package mesh

import (
	"fmt"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

// What a server missed while it was taken for dead includes rechecks: it asks
// before it tells what it missed.
func TestACutOffServerAsksBeforeItTells(t *testing.T) {
	t.Parallel()
	for i := range 6 {
		t.Run(fmt.Sprint(i), func(t *testing.T) {
			t.Parallel()
			embedded(t, func(t *testing.T, w *world) {
				rights := &register{}
				there := w.server()
				here, line := w.mortal()
				for _, s := range []*testServer{here, there} {
					s.track(".*", PresenceOptions{Guard: rights.guard})
				}
				p, busy := here.dial(), there.dial()
				busy.join("doc")
				p.subscribe("doc")
				line.cut()
				w.sleep(15 * time.Second)
				rights.set(p.id, false)
				require.NoError(t, there.Rooms().Recheck(t.Context(), "doc"))
				require.Equal(t, "true", busy.state("doc", map[string]any{"secret": true}))
				w.sleep(time.Duration(i) * 29 * time.Millisecond)
				line.mend()
				w.sleep(15 * time.Second)
				assert.Equal(t, 1, p.pushed("mesh/presence-ended"))
				assert.Zero(t, p.count("state", busy.id))
			})
		})
	}
}
