package socket

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"

	"github.com/meshpresence/mesh/internal/wire"
)

// floor is a handler whose commands, named "LINE [how]", run until end is called for
// them. How: "free" (no line), "holds", "over" (overlaps), "late" (Latest), "beside".
type floor struct {
	*handler
	t *testing.T
	r *rig
	n int

	mu      sync.Mutex // guards the fields below
	log     []string
	gates   map[string]chan struct{} // by id
	running int
	most    int
	open    bool // commands end at once
}

func runFloor(t *testing.T, change func(*Config)) *floor {
	f := &floor{handler: new(handler), t: t, gates: map[string]chan struct{}{}}
	f.order = func(req *wire.Request) Order {
		line, how, _ := strings.Cut(req.Command, " ")
		o := Order{Line: line, Holds: how == "holds", Overlaps: how == "over" || how == "late", Beside: how == "beside"}
		switch how {
		case "free":
			o.Line, o.Overlaps = "", true // has no effect
		case "late":
			o.Latest = 1
		}
		return o
	}
	f.attempt = func(_ context.Context, req wire.Request, _ bool) Begun {
		f.note("+" + req.ID)
		rest := func(ctx context.Context) { f.work(ctx, req) }
		return Begun{Rest: rest, Spared: string(req.Payload) == `"spared"`}
	}
	f.concurrent = func(ctx context.Context, req wire.Request) {
		f.note("+" + req.ID)
		f.work(ctx, req)
	}
	f.r = run(t, f.handler, change)
	return f
}

func (f *floor) note(what string) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.log = append(f.log, what)
}

// work waits for the end, and answers.
func (f *floor) work(ctx context.Context, req wire.Request) {
	f.mu.Lock()
	f.running++
	f.most = max(f.most, f.running)
	gate := make(chan struct{})
	if f.open {
		close(gate)
	} else {
		f.gates[req.ID] = gate
	}
	f.mu.Unlock()
	select {
	case <-gate:
	case <-ctx.Done():
	}
	f.mu.Lock()
	f.running--
	f.mu.Unlock()
	for _, id := range append(req.Also, req.ID) {
		f.r.echo(ctx, wire.Request{ID: id, HasID: true, Command: req.Command})
	}
}

// end lets commands end. Without ids it ends all commands from now on.
func (f *floor) end(ids ...string) {
	f.mu.Lock()
	if len(ids) == 0 {
		f.open = true
		for id := range f.gates {
			ids = append(ids, id)
		}
	}
	for _, id := range ids {
		if gate := f.gates[id]; gate != nil {
			close(gate)
			delete(f.gates, id)
		}
	}
	f.mu.Unlock()
	synctest.Wait()
}

// say makes the client send commands with increasing ids.
func (f *floor) say(commands ...string) {
	for _, command := range commands {
		f.n++
		f.r.say(fmt.Sprintf(`{"id":%d,"command":%q}`, f.n, command))
	}
	synctest.Wait()
}

// begun checks which commands have been begun since the last call. Those of different
// lines may be begun in any order.
func (f *floor) begun(want string) {
	f.t.Helper()
	synctest.Wait()
	f.mu.Lock()
	defer f.mu.Unlock()
	slices.Sort(f.log)
	if got := strings.Join(f.log, " "); got != want {
		f.t.Fatalf("begun: %q, want %q", got, want)
	}
	f.log = nil
}

// answered checks which answers came, in any order.
func (f *floor) answered(want ...string) {
	f.t.Helper()
	var got []string
	for _, m := range f.r.got() {
		got = append(got, m.ID.String()+m.code())
	}
	slices.Sort(got)
	slices.Sort(want)
	if !slices.Equal(got, want) {
		f.t.Fatalf("answers: %q, want %q", got, want)
	}
}

func (f *floor) idle() {
	f.t.Helper()
	synctest.Wait()
	f.r.Socket.mu.Lock()
	defer f.r.Socket.mu.Unlock()
	if f.r.commands != nil {
		f.t.Fatalf("commands are left: %+v", f.r.commands)
	}
}
