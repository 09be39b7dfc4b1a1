package hub

import (
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
)

// question is a call of AskOwner.
type question struct {
	room, owner, conns string
	gone               func([]string)
}

// recordQuestions replaces AskOwner. The returned function returns the questions so
// far.
func (h *harness) recordQuestions() func() []question {
	var mu sync.Mutex // guards list
	var list []question
	h.hub.cfg.AskOwner = func(room, owner string, conns []string, gone func([]string)) {
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

func TestOwnersAreAskedAboutUnconfirmedMembers(t *testing.T) {
	inBubble(t, func(t *testing.T, h *harness) {
		asked := h.recordQuestions()
		for _, c := range []string{"a", "b", "c", "d"} {
			h.redis.join(room, c)
		}
		s := h.watch()
		h.redis.wipe(room, nil)
		h.send(h.redis.join(room, "a"))
		h.sleep(askAfter - time.Millisecond)
		assert.Empty(t, asked())
		h.sleep(2 * time.Millisecond)
		assert.Len(t, asked(), 1)
		first := asked()[0]
		assert.Equal(t, question{room: room, owner: "inc", conns: "b c d"}, question{room: first.room, owner: first.owner, conns: first.conns})
		assert.Empty(t, s.takeLines())

		first.gone([]string{"b"})
		assert.Equal(t, []string{"leave b repair"}, s.takeLines())
		first.gone([]string{"b", "stranger"})
		assert.Empty(t, s.takeLines())
		v, _ := h.hub.View(room)
		assert.Equal(t, 3, v.Total)
		h.send(h.redis.join(room, "c"))
		h.sleep(askAfter)
		assert.Len(t, asked(), 2, "asked again")
		assert.Equal(t, "d", asked()[1].conns)
		h.send(h.redis.join(room, "d"))
		h.sleep(time.Minute)
		assert.Len(t, asked(), 2, "no member is unconfirmed")
		assert.Empty(t, s.takeLines())
		assert.EqualValues(t, 1, h.hub.Stats().LeftUnconfirmed)
		h.checkSink(s)
	})
}

// A late answer does not count if its member was written again and lost again since.
func TestLateAnswerOfOwner(t *testing.T) {
	inBubble(t, func(t *testing.T, h *harness) {
		asked := h.recordQuestions()
		h.redis.join(room, "a")
		h.redis.join(room, "b")
		s := h.watch()
		for range 2 {
			h.redis.wipe(room, nil)
			h.send(h.redis.join(room, "a"))
			h.sleep(askAfter + time.Millisecond)
			if len(asked()) == 1 {
				h.send(h.redis.join(room, "b"))
			}
		}
		assert.Len(t, asked(), 2)
		asked()[0].gone([]string{"b"})
		assert.Empty(t, s.takeLines())
		asked()[1].gone([]string{"b"})
		assert.Equal(t, []string{"leave b repair"}, s.takeLines())
		h.checkSink(s)
	})
}

// An answer also counts while a snapshot is read: if the snapshot has the member, it
// has joined again since.
func TestAnswerOfOwnerWhileReading(t *testing.T) {
	inBubble(t, func(t *testing.T, h *harness) {
		asked := h.recordQuestions()
		h.redis.join(room, "a")
		h.redis.join(room, "b")
		h.redis.join(room, "c")
		s := h.watch()
		h.redis.wipe(room, nil)
		h.send(h.redis.join(room, "a"))
		h.sleep(askAfter + time.Millisecond)
		h.redis.set(func(f *fakeRedis) { f.delay = 10 * time.Millisecond })
		h.redis.join(room, "c", withEntry("e2"))
		h.send(h.redis.join(room, "x")) // the event before it is lost
		h.sleep(earlyTimeout + time.Millisecond)
		asked()[0].gone([]string{"b", "c"})
		assert.Equal(t, []string{"leave b repair", "leave c repair"}, s.takeLines())
		h.sleep(time.Minute)
		assert.ElementsMatch(t, []string{`join c {"n":"c"} repair`, `join x {"n":"x"} repair`}, s.takeLines())
		h.checkSink(s)
	})
}
