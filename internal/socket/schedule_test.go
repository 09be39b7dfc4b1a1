package socket

import (
	"context"
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/meshpresence/mesh/internal/wire"
)

// referee checks that commands are executed in an allowed order. They are named "LINE
// KIND", with the kinds of floor that are not empty, "again" and "fails".
type referee struct {
	t *testing.T
	r *rig

	mu       sync.Mutex      // guards the fields below
	rng      *rand.Rand      // of the handler
	kinds    []string        // by id
	lines    []string        // by id
	begun    []bool          // by id
	done     []bool          // by id; a superseded command is done with the one that replaced it
	answered map[string]int  // by id
	faults   map[string]bool // faults found
}

func (f *referee) fault(format string, args ...any) { f.faults[fmt.Sprintf(format, args...)] = true }

func kindOf(command string) (line, kind string) {
	line, kind, _ = strings.Cut(command, " ")
	return line, kind
}

func (f *referee) order(req *wire.Request) Order {
	line, kind := kindOf(req.Command)
	o := Order{Line: line, Holds: kind == "holds", Overlaps: kind == "over" || kind == "late", Beside: kind == "beside"}
	switch kind {
	case "free", "freeagain":
		o.Line = ""
	case "late":
		o.Latest = 1
	}
	return o
}

// ids returns the numbers of a request and of those that it answers for.
func ids(req wire.Request) (all []int) {
	for _, id := range append(slices.Clone(req.Also), req.ID) {
		var n int
		_, _ = fmt.Sscan(id, &n)
		all = append(all, n)
	}
	return all
}

// begins checks the beginning of a command. If it is begun again, that is the last
// beginning.
func (f *referee) begins(req wire.Request, last bool) {
	all := ids(req)
	id := all[len(all)-1]
	line, kind := kindOf(req.Command)
	again := kind == "again" || kind == "freeagain"
	for n := range id {
		switch {
		case slices.Contains(all, n):
		case f.kinds[n] == "holds" && !f.done[n]:
			f.fault("%s %d is begun before one that holds", kind, id)
		case kind == "beside" || f.done[n] || f.kinds[n] == "beside":
		case again && last:
			f.fault("%s %d is begun for the last time before those that came earlier are done", kind, id)
		case f.lines[n] != line || kind == "free" || kind == "freeagain" || strings.HasPrefix(f.kinds[n], "free"):
		case !f.begun[n]:
			f.fault("%s %d is begun before %s %d", kind, id, f.kinds[n], n)
		case kind != "over" && kind != "late" || f.kinds[n] != "over" && f.kinds[n] != "late":
			f.fault("%s %d is begun while %s %d is done", kind, id, f.kinds[n], n)
		}
	}
	if f.begun[id] && !again {
		f.fault("%d is begun twice", id)
	}
	for _, n := range all {
		f.begun[n] = true
	}
}

func (f *referee) Begin(ctx context.Context, req wire.Request, last bool) Begun {
	_, kind := kindOf(req.Command)
	f.mu.Lock()
	f.begins(req, last)
	wait := time.Duration(f.rng.IntN(3)) * 10 * time.Millisecond
	spared, slot := f.rng.IntN(4) == 0, f.rng.IntN(3) == 0
	f.mu.Unlock()
	if !last && (kind == "again" || kind == "freeagain") {
		return Begun{Again: true, Rest: func(context.Context) { f.t.Error("Rest of a command that is begun again") }}
	}
	rest := func(ctx context.Context) {
		if slot {
			_ = AwaitAnswerSlot(ctx)
		}
		time.Sleep(wait)
		f.ends(ctx, req)
		if kind == "fails" {
			panic("boo")
		}
	}
	return Begun{Rest: rest, Spared: spared}
}

// ends answers. A command is done before that, because the next may be begun at once.
func (f *referee) ends(ctx context.Context, req wire.Request) {
	f.mu.Lock()
	for _, n := range ids(req) {
		f.done[n] = true
	}
	f.mu.Unlock()
	if _, kind := kindOf(req.Command); kind == "fails" {
		return // the socket answers
	}
	for _, id := range append(slices.Clone(req.Also), req.ID) {
		f.r.echo(ctx, wire.Request{ID: id, HasID: true, Command: req.Command})
	}
}

func (f *referee) concurrent(ctx context.Context, req wire.Request) {
	f.mu.Lock()
	f.begins(req, false)
	wait := time.Duration(f.rng.IntN(3)) * 10 * time.Millisecond
	f.mu.Unlock()
	time.Sleep(wait)
	f.ends(ctx, req)
}

// Commands of any kind in any order are begun in an allowed order and answered once, and
// nothing is left of them. Nothing is left either if the connection ends in between.
func TestScheduleAtRandom(t *testing.T) {
	t.Parallel()
	for seed := range uint64(150) {
		synctest.Test(t, func(t *testing.T) { scheduleAtRandom(t, seed) })
	}
}

func scheduleAtRandom(t *testing.T, seed uint64) {
	rng := rand.New(rand.NewPCG(seed, 1))
	const n = 200
	f := &referee{t: t, rng: rand.New(rand.NewPCG(seed, 2)), begun: make([]bool, n), done: make([]bool, n), answered: map[string]int{}, faults: map[string]bool{}}
	h := &handler{order: f.order, attempt: f.Begin, concurrent: f.concurrent}
	f.r = prepare(t, h, func(c *Config) {
		c.CommandsPerSecond = []int{0, 100, 1000}[rng.IntN(3)]
		c.QueueBytes = []int{2000, 10_000, 1 << 20}[rng.IntN(3)]
		c.LinesAtOnce, c.HandlerConcurrency = 1+rng.IntN(5), 1+rng.IntN(3)
	})
	f.r.group.extraLines = rng.Int64N(3)
	f.r.start(true)
	kinds := []string{"", "", "over", "over", "late", "late", "free", "beside", "again", "freeagain", "fails", "holds"}
	ends, texts := rng.IntN(3) == 0, make([]string, n)
	for i := range n {
		kind, line := kinds[rng.IntN(len(kinds))], fmt.Sprint("line", rng.IntN(4))
		if kind == "holds" && rng.IntN(3) > 0 {
			kind = ""
		}
		f.kinds, f.lines = append(f.kinds, kind), append(f.lines, line)
		texts[i] = fmt.Sprintf(`{"id":%d,"command":"%s %s"}`, i, line, kind)
	}
	for i, text := range texts {
		f.r.say(text)
		if rng.IntN(8) == 0 {
			time.Sleep(time.Duration(rng.IntN(4)) * 10 * time.Millisecond)
		}
		if ends && i == n*2/3 {
			f.r.Close(1000, "")
			break
		}
	}
	if ends {
		f.r.end()
	} else {
		time.Sleep(time.Minute)
	}
	for _, m := range f.r.got() {
		f.answered[m.ID.String()]++
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	for i := range texts {
		if got := f.answered[fmt.Sprint(i)]; got > 1 || got == 0 && !ends {
			f.fault("%s %d was answered %d times", f.kinds[i], i, got)
		}
	}
	s := f.r.Socket
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.commands != nil || s.queued() != 0 || s.answers != 0 || s.group.lines.Load() != 0 {
		f.fault("left: %+v, %d bytes, %d of answers, %d lines", s.commands, s.queued(), s.answers, s.group.lines.Load())
	}
	if len(f.faults) > 0 {
		t.Fatalf("seed %d: %v", seed, f.faults)
	}
}
