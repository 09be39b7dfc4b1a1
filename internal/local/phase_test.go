package local

import (
	"bytes"
	"fmt"
	"log/slog"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/meshpresence/mesh/internal/store"
)

func TestTransitions(t *testing.T) {
	t.Parallel()
	legal := map[phase]string{
		out:       "join→unsent",
		returning: "join→unsent leave→out forget→out",
		unsent:    "leave→out silence→returning forget→out rejoin→unsent send→sent",
		sent:      "leave→out silence→returning forget→out full→out rejoin→unsent send→sent refusal→unsent join written→held",
		held:      "leave→out silence→returning conflict→out forget→out rejoin→unsent verify→verifying update written→held",
		verifying: "leave→out silence→returning conflict→out forget→out rejoin→unsent verify→verifying update written→held",
	}
	for p := range phaseCount {
		var found []byte
		for by, t := range transitions {
			if t.from.has(p) {
				found = fmt.Appendf(found, "%v→%v ", transition(by), t.to)
			}
		}
		require.Equal(t, legal[p], string(bytes.TrimSpace(found)), "from %v", p)
	}
}

// Every transition that the table does not list is reported, and none that it lists.
func TestIllegalTransitionsAreReported(t *testing.T) {
	virtual(t, func(r *rig) {
		var reported, want []string
		c := r.connect("c")
		r.join(c, "room")
		fails := r.illegal
		r.illegal = func(transition string) { reported = append(reported, transition) }
		c.mu.Lock()
		e := c.entries["room"]
		for from := range phaseCount {
			for by := range transitionCount {
				e.phase = from
				e.move(by)
				if !transitions[by].from.has(from) {
					want = append(want, fmt.Sprintf("%v while %v", by, from))
				}
			}
		}
		e.phase = held
		c.mu.Unlock()
		r.illegal = fails
		require.Equal(r, want, reported)
	})
}

func TestIllegalTransitionIsLogged(t *testing.T) {
	var log bytes.Buffer
	virtual(t, func(r *rig) {
		c := r.connect("c")
		r.join(c, "room")
		r.illegal = r.logIllegal
		c.mu.Lock()
		c.entries["room"].move(byJoinWritten)
		c.mu.Unlock()
		require.Contains(r, log.String(), `level=ERROR msg="mesh: illegal transition of an entry, a mistake in mesh" transition="join written while held"`)
	}, func(cfg *Config) { cfg.Logger = slog.New(slog.NewTextHandler(&log, nil)) })
}

// The counts that depend on the phase follow it.
func TestPhaseIsCounted(t *testing.T) {
	virtual(t, func(r *rig) {
		r.rule("room", 2*time.Second)
		c := r.connect("c")
		counts := func() string {
			stored, _ := r.writers[0].comparable(r.incarnation())
			return fmt.Sprint(stored, r.Stats().Entries, c.frameWaiters.Load())
		}
		r.sleep(0)
		require.Equal(r, "1 0 0", counts(), "the registration")
		r.away()
		_, err := c.Join(r.Context(), "room")
		require.ErrorIs(r, err, ErrUnavailable)
		require.Equal(r, "1 1 0", counts(), "sent")
		r.heal()
		c.Touched()
		r.sleep(time.Second)
		require.Equal(r, "2 1 0", counts(), "held")
		r.sleep(2 * time.Second)
		require.Equal(r, "1 0 1", counts(), "returning")
		c.Touched()
		r.sleep(time.Second)
		require.Equal(r, "2 1 0", counts(), "held again")
		r.leave(c, "room")
		require.Equal(r, "1 0 0", counts(), "out")
		r.atRest()
	})
}

// A connection that has joined through another server while its entry is verified is out
// of the room here.
func TestConflictWhileVerifying(t *testing.T) {
	virtual(t, func(r *rig) {
		c := r.connect("c")
		r.join(c, "room")
		r.redis.do(func() { r.redis.rooms["room"]["c"] = storedEntry{entry: "other", inc: "other"} })
		r.plan(func(int, []store.Op) fault { return fault{before: 100 * time.Millisecond} })
		c.mu.Lock()
		e := c.entries["room"]
		e.verify()
		during := e.phase
		c.mu.Unlock()
		require.Equal(r, verifying, during)
		r.sleep(time.Second)
		require.False(r, c.In("room"))
		h, _ := r.storedEntry("room", "c")
		require.Equal(r, "other", h.entry, "the entry of the other server stays")
	})
}
