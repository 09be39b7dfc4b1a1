package channels

import (
	"fmt"
	"math/rand/v2"
	"sync"
	"testing"
	"testing/synctest"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// fakeListener notes the calls of a Mux. The test confirms.
type fakeListener struct {
	mu    sync.Mutex
	calls []string
	rooms map[string]bool
}

func (l *fakeListener) Add(room string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.calls = append(l.calls, "add "+room)
	l.rooms[room] = true
}

func (l *fakeListener) Remove(room string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.calls = append(l.calls, "remove "+room)
	delete(l.rooms, room)
}

func (l *fakeListener) take() []string {
	l.mu.Lock()
	defer l.mu.Unlock()
	calls := l.calls
	l.calls = nil
	return calls
}

// part is a handler with its share. Like the hub, it calls its share with a lock that its
// handler methods take, too.
type part struct {
	*Share

	mu    sync.Mutex
	lines []string
}

func (p *part) add(rooms ...string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, room := range rooms {
		p.Add(room)
	}
}

func (p *part) remove(room string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.Remove(room)
}

func (p *part) note(line string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.lines = append(p.lines, line)
}

func (p *part) HandleSubscribed(room string, again bool) { p.note(fmt.Sprint(room, " ", again)) }
func (p *part) HandleEvent(room, payload string)         { p.note(room + "=" + payload) }
func (p *part) HandleDisconnect()                        { p.note("disconnect") }

func (p *part) take() []string {
	p.mu.Lock()
	defer p.mu.Unlock()
	lines := p.lines
	p.lines = nil
	return lines
}

// rig is a Mux with two parts.
type rig struct {
	*Mux
	listener *fakeListener
	a, b     *part
	work     sync.WaitGroup
}

func newRig() *rig {
	r := &rig{listener: &fakeListener{rooms: map[string]bool{}}, a: &part{}, b: &part{}}
	r.Mux = New(r.listener, r.work.Go)
	for _, p := range []*part{r.a, r.b} {
		p.Share = r.NewShare()
		p.Connect(p)
	}
	return r
}

func inBubble(t *testing.T, test func(*testing.T, *rig)) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		r := newRig()
		test(t, r)
		r.work.Wait()
	})
}

func TestAChannelIsSubscribedToOnce(t *testing.T) {
	inBubble(t, func(t *testing.T, r *rig) {
		r.a.add("x", "x")
		r.b.add("x")
		require.Equal(t, []string{"add x"}, r.listener.take())
		r.HandleSubscribed("x", false)
		r.HandleEvent("x", "1")
		require.Equal(t, []string{"x false", "x=1"}, r.a.take())
		require.Equal(t, []string{"x false", "x=1"}, r.b.take())

		r.a.remove("x")
		r.a.remove("x")
		require.Empty(t, r.listener.take(), "the other share still wants it")
		r.HandleEvent("x", "2")
		require.Empty(t, r.a.take())
		require.Equal(t, []string{"x=2"}, r.b.take())
		r.b.remove("x")
		require.Equal(t, []string{"remove x"}, r.listener.take())
		r.HandleEvent("x", "3")
		r.HandleSubscribed("x", false)
		require.Equal(t, []string{"x=3"}, append(r.a.take(), r.b.take()...), "the first share counts it")
		require.Empty(t, r.rooms)
	})
}

func TestALaterShareIsConfirmedAtOnce(t *testing.T) {
	inBubble(t, func(t *testing.T, r *rig) {
		r.a.add("x", "y")
		r.HandleSubscribed("x", false)
		r.b.add("x", "y")
		synctest.Wait()
		require.Equal(t, []string{"x false"}, r.b.take(), "y is not confirmed")
		r.HandleEvent("x", "1")
		require.Equal(t, []string{"x=1"}, r.b.take())
		r.HandleSubscribed("y", false)
		require.Equal(t, []string{"y false"}, r.b.take())
		require.Equal(t, []string{"x false", "x=1", "y false"}, r.a.take())
		require.Equal(t, []string{"add x", "add y"}, r.listener.take())

		// Back again after it was given back: the first confirmation of a new Add.
		r.b.remove("x")
		r.b.add("x")
		synctest.Wait()
		require.Equal(t, []string{"x false"}, r.b.take())
		require.Empty(t, r.a.take())
	})
}

func TestEachShareKnowsWhetherItMayHaveMissedEvents(t *testing.T) {
	inBubble(t, func(t *testing.T, r *rig) {
		r.a.add("x")
		r.HandleSubscribed("x", false)
		r.HandleDisconnect()
		r.b.add("x")
		synctest.Wait()
		require.Equal(t, []string{"disconnect"}, r.b.take(), "not confirmed on this connection")
		r.HandleSubscribed("x", true)
		require.Equal(t, []string{"x false", "disconnect", "x true"}, r.a.take())
		require.Equal(t, []string{"x false"}, r.b.take(), "the first confirmation after its Add")
		r.HandleSubscribed("x", true)
		require.Equal(t, []string{"x true"}, r.b.take())
	})
}

// While the confirmation of a late share waits, the connection ends, or the share gives
// the room back, or gets the confirmation of a new connection.
func TestALateConfirmationThatIsOvertaken(t *testing.T) {
	for name, test := range map[string]struct {
		then func(r *rig)
		want []string
	}{
		"by an event":          {func(r *rig) { r.HandleEvent("x", "1") }, []string{"x false"}},
		"by a disconnect":      {func(r *rig) { r.HandleDisconnect() }, []string{"disconnect"}},
		"by the room's return": {func(r *rig) { r.b.remove("x") }, nil},
		"by another Add":       {func(r *rig) { r.b.remove("x"); r.b.add("x") }, []string{"x false"}},
		"by a confirmation":    {func(r *rig) { r.HandleSubscribed("x", true) }, []string{"x false"}},
		"by a new connection": {
			func(r *rig) { r.HandleDisconnect(); r.HandleSubscribed("x", true) },
			[]string{"disconnect", "x false"},
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			r := newRig()
			var held []func()
			r.run = func(f func()) { held = append(held, f) }
			r.a.add("x")
			r.HandleSubscribed("x", false)
			r.b.add("x")
			require.Len(t, held, 1)
			test.then(r)
			require.Len(t, held, 1, "one goroutine")
			held[0]()
			require.Equal(t, test.want, r.b.take())
			require.Empty(t, r.late)
			require.False(t, r.confirming)
		})
	}
}

func TestAMessageCostsNoAllocation(t *testing.T) {
	r := newRig()
	quiet := &struct{ discard }{}
	r.a.Connect(quiet)
	r.b.Connect(quiet)
	r.a.add("x")
	r.b.add("x")
	r.HandleSubscribed("x", false)
	require.Zero(t, testing.AllocsPerRun(100, func() { r.HandleEvent("x", "1") }))
}

type discard struct{}

func (discard) HandleSubscribed(string, bool) {}
func (discard) HandleEvent(string, string)    {}
func (discard) HandleDisconnect()             {}

// checked is a part that checks the order of its calls.
type checked struct {
	t *testing.T
	*Share

	mu        sync.Mutex
	wanted    map[string]int // rooms, with the number of confirmations since Add
	confirmed map[string]bool
	events    map[string]int
}

func (c *checked) add(room string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if _, ok := c.wanted[room]; !ok {
		c.wanted[room] = 0
		delete(c.confirmed, room)
	}
	c.Add(room)
}

func (c *checked) remove(room string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	delete(c.wanted, room)
	delete(c.confirmed, room)
	c.Remove(room)
}

func (c *checked) HandleSubscribed(room string, again bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	n, ok := c.wanted[room]
	if !ok {
		return // it was under way
	}
	assert.Equal(c.t, n > 0, again, "%s after %d confirmations", room, n)
	c.wanted[room], c.confirmed[room] = n+1, true
}

func (c *checked) HandleEvent(room, _ string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if _, ok := c.wanted[room]; ok {
		assert.True(c.t, c.confirmed[room], "an event of %s before its confirmation", room)
		c.events[room]++
	}
}

func (c *checked) HandleDisconnect() {
	c.mu.Lock()
	defer c.mu.Unlock()
	clear(c.confirmed)
}

// Whatever two parts ask for, each gets what it would get from a listener of its own.
func TestRandomSharing(t *testing.T) {
	t.Parallel()
	for seed := range uint64(30) {
		t.Run(fmt.Sprint(seed), func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) { runRandomSharing(t, rand.New(rand.NewPCG(seed, 7))) })
		})
	}
}

func runRandomSharing(t *testing.T, random *rand.Rand) {
	l := &fakeListener{rooms: map[string]bool{}}
	var work sync.WaitGroup
	m := New(l, work.Go)
	var parts []*checked
	for range 3 {
		p := &checked{t: t, Share: m.NewShare(), wanted: map[string]int{}, confirmed: map[string]bool{}, events: map[string]int{}}
		p.Connect(p)
		parts = append(parts, p)
	}
	rooms := []string{"x", "y", "z"}
	confirmed := map[string]bool{} // on this connection
	reported := map[string]bool{}
	for range 2000 {
		p, room := parts[random.IntN(len(parts))], rooms[random.IntN(len(rooms))]
		switch random.IntN(8) {
		case 0, 1, 2:
			p.add(room)
		case 3, 4:
			p.remove(room)
		case 5:
			if l.rooms[room] {
				m.HandleSubscribed(room, reported[room])
				confirmed[room], reported[room] = true, true
			}
		case 6:
			if confirmed[room] {
				m.HandleEvent(room, "e")
			}
		case 7:
			if random.IntN(5) == 0 {
				m.HandleDisconnect()
				clear(confirmed)
			}
		}
		for _, room := range rooms { // a new Add is confirmed by itself
			if !l.rooms[room] {
				delete(confirmed, room)
				delete(reported, room)
			}
		}
		if random.IntN(3) == 0 {
			synctest.Wait()
		}
	}
	for _, room := range rooms {
		if l.rooms[room] {
			m.HandleSubscribed(room, reported[room])
		}
	}
	work.Wait()
	want := 0
	for _, room := range rooms {
		wanted := false
		for _, p := range parts {
			if _, ok := p.wanted[room]; ok {
				wanted = true
				assert.True(t, p.confirmed[room], "%s is confirmed for every part that wants it", room)
			}
		}
		assert.Equal(t, wanted, l.rooms[room], "%s", room)
		if wanted {
			want++
		}
	}
	assert.Len(t, m.rooms, want)
}
