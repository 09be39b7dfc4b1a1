package hub

import (
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
)

// question is one that was asked.
type question struct {
	room, owner, conns string
	gone               func([]string)
}

// asked collects the questions instead of asking, and returns them.
func (h *house) asked() func() []question {
	var mu sync.Mutex // guards list
	var list []question
	h.hub.cfg.Ask = func(room, owner string, conns []string, gone func([]string)) {
		mu.Lock()
		defer mu.Unlock()
		slices.Sort(conns)
		list = append(list, question{room, owner, strings.Join(conns, " "), gone})
	}
	return func() []question {
		mu.Lock()
		defer mu.Unlock()
		return list
	}
}

func TestOwnersAreAskedAboutDoubts(t *testing.T) {
	live(t, func(t *testing.T, h *house) {
		asked := h.asked()
		for _, c := range []string{"a", "b", "c", "d"} {
			h.redis.join(room, c)
		}
		s := h.watch()
		h.redis.wipe(room, nil)
		h.send(h.redis.join(room, "a"))
		h.pass(askAfter - time.Millisecond)
		assert.Empty(t, asked())
		h.pass(2 * time.Millisecond)
		assert.Len(t, asked(), 1)
		first := asked()[0]
		assert.Equal(t, question{room: room, owner: "inc", conns: "b c d"}, question{room: first.room, owner: first.owner, conns: first.conns})
		assert.Empty(t, s.heard())

		first.gone([]string{"b"})
		assert.Equal(t, []string{"leave b repair"}, s.heard())
		first.gone([]string{"b", "stranger"})
		assert.Empty(t, s.heard())
		v, _ := h.hub.View(room)
		assert.Equal(t, 3, v.Total)
		h.send(h.redis.join(room, "c"))
		h.pass(askAfter)
		assert.Len(t, asked(), 2, "asked again")
		assert.Equal(t, "d", asked()[1].conns)
		h.send(h.redis.join(room, "d"))
		h.pass(time.Minute)
		assert.Len(t, asked(), 2, "nobody is in doubt any more")
		assert.Empty(t, s.heard())
		assert.EqualValues(t, 1, h.hub.Stats().Disowned)
		h.agree(s)
	})
}

// An answer that comes when its member has been back, and was lost again,
// speaks of what was before.
func TestLateAnswerAboutADoubt(t *testing.T) {
	live(t, func(t *testing.T, h *house) {
		asked := h.asked()
		h.redis.join(room, "a")
		h.redis.join(room, "b")
		s := h.watch()
		for range 2 {
			h.redis.wipe(room, nil)
			h.send(h.redis.join(room, "a"))
			h.pass(askAfter + time.Millisecond)
			if len(asked()) == 1 {
				h.send(h.redis.join(room, "b"))
			}
		}
		assert.Len(t, asked(), 2)
		asked()[0].gone([]string{"b"})
		assert.Empty(t, s.heard())
		asked()[1].gone([]string{"b"})
		assert.Equal(t, []string{"leave b repair"}, s.heard())
		h.agree(s)
	})
}

// While a snapshot is read the answer is taken all the same: what the snapshot
// shows of the member is a later life of it.
func TestAnswerWhileReading(t *testing.T) {
	live(t, func(t *testing.T, h *house) {
		asked := h.asked()
		h.redis.join(room, "a")
		h.redis.join(room, "b")
		h.redis.join(room, "c")
		s := h.watch()
		h.redis.wipe(room, nil)
		h.send(h.redis.join(room, "a"))
		h.pass(askAfter + time.Millisecond)
		h.redis.set(func(f *fakeRedis) { f.delay = 10 * time.Millisecond })
		h.redis.join(room, "c", withEntry("e2"))
		h.send(h.redis.join(room, "x")) // the one before was not heard
		h.pass(holdFor + time.Millisecond)
		asked()[0].gone([]string{"b", "c"})
		assert.Equal(t, []string{"leave b repair", "leave c repair"}, s.heard())
		h.pass(time.Minute)
		assert.ElementsMatch(t, []string{`join c {"n":"c"} repair`, `join x {"n":"x"} repair`}, s.heard())
		h.agree(s)
	})
}
