package peers

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/meshpresence/mesh/internal/errs"
)

// group is a group of servers whose channels are in memory.
type group struct {
	mu      sync.Mutex // guards the fields below
	servers map[string]*Peers
	lose    int      // messages that get lost from now on
	sent    []string // channel and first word of each message
}

// member adds a server that executes calls as the test says.
func (g *group) member(t *testing.T, name string, execute func(context.Context, Call) (Result, error), deliver func(Frame)) *Peers {
	t.Helper()
	p := New(Config{
		Life: t.Context(), Incarnation: func() string { return name }, Channel: func(incarnation string) string { return incarnation },
		Publish: g.publish, Execute: execute, Deliver: deliver, SetMetadata: func(string, uint64, []byte) {},
		Owners:  func(context.Context, string) ([]string, error) { return []string{"b"}, nil },
		Servers: func(context.Context) ([]string, error) { return []string{"a", "b", "c"}, nil },
		ToError: func(_ context.Context, err error) error { return err },
	})
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.servers == nil {
		g.servers = make(map[string]*Peers)
	}
	g.servers[name] = p
	return p
}

func (g *group) publish(ctx context.Context, channel, payload string) (int64, error) {
	if err := ctx.Err(); err != nil {
		return 0, err
	}
	g.mu.Lock()
	word, _, _ := strings.Cut(payload, " ")
	g.sent = append(g.sent, channel+" "+word)
	to := g.servers[channel]
	lost := g.lose > 0
	g.lose--
	g.mu.Unlock()
	if to == nil || lost {
		return 0, nil
	}
	to.HandleMessage(payload)
	return 1, nil
}

func none(context.Context, Call) (Result, error) { return Result{}, nil }

func TestCall(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		var g group
		var executed atomic.Int32
		execute := func(_ context.Context, call Call) (Result, error) {
			executed.Add(1)
			if call.Conn == "unknown" {
				return Result{}, fmt.Errorf("%w: %s", errs.UnknownConnection, call.Conn)
			}
			return Result{OK: true, Rooms: []string{call.Conn}}, nil
		}
		a := g.member(t, "a", execute, nil)
		b := g.member(t, "b", execute, nil)
		for _, at := range []string{"a", "b"} {
			got, err := a.Call(t.Context(), At(at), Call{Op: OpRooms, Conn: "c1"})
			require.NoError(t, err)
			assert.Equal(t, Result{OK: true, Rooms: []string{"c1"}}, got)
			_, err = a.Call(t.Context(), At(at), Call{Op: OpRooms, Conn: "unknown"})
			require.ErrorIs(t, err, errs.UnknownConnection)
		}
		require.EqualValues(t, 4, executed.Swap(0))
		require.Len(t, g.sent, 4, "a call of its own makes no detour: %v", g.sent)

		// The call is lost, then the answer. It is carried out once.
		g.lose = 1
		began := time.Now()
		_, err := a.Call(t.Context(), At("b"), Call{Op: OpRooms, Conn: "c1"})
		require.NoError(t, err)
		require.Equal(t, callRetry, time.Since(began))
		require.EqualValues(t, 1, executed.Swap(0))

		began = time.Now()
		_, err = a.Call(t.Context(), At("dead"), Call{Op: OpRooms, Conn: "c1"})
		require.ErrorIs(t, err, errs.Unavailable)
		require.Equal(t, CallLimit, time.Since(began))
		require.Empty(t, a.waiting)

		ctx, cancel := context.WithCancelCause(t.Context())
		why := errors.New("the app has changed its mind")
		time.AfterFunc(time.Millisecond, func() { cancel(why) })
		_, err = a.Call(ctx, At("dead"), Call{})
		require.ErrorIs(t, err, context.Canceled)
		require.ErrorIs(t, err, why)

		b.Stop()
		_, err = a.Call(t.Context(), At("b"), Call{})
		require.ErrorIs(t, err, errs.Unavailable)
	})
}

// A repeated call gets the answer of the first, until it is forgotten.
func TestRepeatedCallChangesNothing(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		var g group
		var executed int
		b := g.member(t, "b", func(context.Context, Call) (Result, error) {
			executed++
			return Result{Count: executed}, nil
		}, nil)
		for range 3 {
			b.HandleMessage(`call {"id":"1","from":"a","op":"add"}`)
			b.Wait()
		}
		require.Equal(t, 1, executed)
		require.Equal(t, []string{"a done", "a done", "a done"}, g.sent)
		time.Sleep(2*CallLimit + 1)
		b.HandleMessage(`call {"id":"2","from":"a","op":"add"}`)
		b.Wait()
		require.Len(t, b.seen, 1)
		require.Len(t, b.order, 1)
	})
}

func TestCallsAtOnce(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		var g group
		var executed atomic.Int32
		b := g.member(t, "b", func(context.Context, Call) (Result, error) {
			executed.Add(1)
			time.Sleep(time.Second)
			return Result{}, nil
		}, nil)
		for i := range 2 * callsAtOnce {
			b.HandleMessage(fmt.Sprintf(`call {"id":"%d","from":"a","op":"add"}`, i))
		}
		b.Wait()
		require.EqualValues(t, callsAtOnce, executed.Load())
	})
}

func TestSend(t *testing.T) {
	t.Parallel()
	var g group
	var got []Frame
	deliver := func(f Frame) { got = append(got, f) }
	a := g.member(t, "a", none, deliver)
	g.member(t, "b", none, deliver)
	f := Frame{Conn: "c", Command: "x", Payload: json.RawMessage(`{"a":1}`)}
	require.NoError(t, a.Send(t.Context(), "a", f))
	require.NoError(t, a.Send(t.Context(), "b", f))
	require.Equal(t, []Frame{f, f}, got)
	require.Equal(t, []string{"b send"}, g.sent)
}

func TestClear(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		var g group
		parts := func(_ context.Context, call Call) (Result, error) {
			if call.After == "" {
				return Result{OK: true, Count: 2, After: "c2"}, nil
			}
			return Result{OK: true, Count: 1}, nil
		}
		a := g.member(t, "a", parts, nil)
		g.member(t, "b", parts, nil)
		removed, err := a.Clear(t.Context(), "room")
		require.ErrorIs(t, err, errs.Unavailable, "c does not answer")
		require.Equal(t, 6, removed)
		g.member(t, "c", parts, nil)
		removed, err = a.Clear(t.Context(), "room")
		require.NoError(t, err)
		require.Equal(t, 9, removed)
		require.NoError(t, a.CallAll(t.Context(), Call{Op: OpRecheckRoom, Room: "room"}))
	})
}

func TestMetadata(t *testing.T) {
	t.Parallel()
	var got []string
	p := New(Config{SetMetadata: func(conn string, version uint64, data []byte) {
		got = append(got, fmt.Sprintf("%s %d %s %t", conn, version, data, data == nil))
	}})
	for _, text := range []string{"meta c 1 {\"a b\": 1}", "meta c 2 ", "meta c x {}", "meta", "meta c", "odd c 1 {}"} {
		p.HandleMessage(text)
	}
	require.Equal(t, []string{`c 1 {"a b": 1} false`, "c 2  true"}, got)
}
