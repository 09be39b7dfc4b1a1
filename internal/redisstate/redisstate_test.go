package redisstate

import (
	"context"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"
)

// parts counts the calls of a State.
type parts struct {
	*State
	id        atomic.Pointer[string] // of the Redis that answers; nil: none
	suspended atomic.Bool
	work      sync.WaitGroup

	resets, recreated, resyncs, aways, rechecks atomic.Int32
	pausedUntil                                 atomic.Int64
}

const lease = 4 * time.Second

func newParts(t *testing.T) *parts {
	t.Helper()
	p := &parts{}
	p.becomes("one")
	p.State = New(Config{
		Generation: func(context.Context) (string, bool) {
			if id := p.id.Load(); id != nil {
				return *id, true
			}
			return "", false
		},
		Suspend: func() { p.suspended.Store(true) }, Resume: func() { p.suspended.Store(false) },
		ResetContact: func() { p.resets.Add(1) }, Recreate: func() { p.recreated.Add(1) },
		PauseExpired: func(until time.Time) { p.pausedUntil.Store(until.UnixNano()) },
		Resync:       func() { p.resyncs.Add(1) }, Away: func() { p.aways.Add(1) }, Recheck: func() { p.rechecks.Add(1) },
		Go: p.work.Go, LeaseTTL: lease, Life: t.Context(), Running: t.Context(),
	})
	return p
}

func (p *parts) becomes(id string) { p.id.Store(&id) }

// A connection of which the same process answers again resumes contact, unless it has
// been lost again.
func TestContactAfterALostConnection(t *testing.T) {
	t.Parallel()
	p := newParts(t)
	p.Connected()
	p.work.Wait()
	require.True(t, p.TakeMissed())
	require.False(t, p.TakeMissed())
	require.Zero(t, p.resets.Load(), "the first process")

	p.Disconnected()
	require.True(t, p.TakeMissed())
	require.True(t, p.suspended.Load())
	p.Connected()
	p.work.Wait()
	require.False(t, p.suspended.Load())
	require.Zero(t, p.resets.Load(), "the same process")

	p.Disconnected()
	seen := p.disconnects.count()
	p.Disconnected()
	p.checkGeneration(seen)
	require.True(t, p.suspended.Load(), "it was lost again")
	p.checkGeneration(seen + 1)
	require.False(t, p.suspended.Load())

	p.becomes("two")
	p.Connected()
	p.work.Wait()
	require.EqualValues(t, 1, p.resets.Load())
	require.EqualValues(t, 1, p.recreated.Load())
	p.id.Store(nil)
	p.Connected()
	p.work.Wait()
	require.EqualValues(t, 2, p.resets.Load(), "no answer counts as another process")
	require.EqualValues(t, 1, p.recreated.Load())
}

func TestSuspectedFailoversAreHandledOnceInAPause(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		p := newParts(t)
		p.NoteGeneration("one")
		for range 100 {
			p.FailoverSuspected()
			require.Equal(t, time.Now().Add(lease).UnixNano(), p.pausedUntil.Load())
			time.Sleep(100 * time.Millisecond)
		}
		p.work.Wait()
		require.LessOrEqual(t, p.resyncs.Load(), int32(10*time.Second/failoverPause)+2)
		require.Greater(t, p.resyncs.Load(), int32(1))
		require.Zero(t, p.resets.Load(), "each master is the process that it was")
		p.id.Store(nil)
		p.FailoverSuspected()
		p.work.Wait()
		require.Zero(t, p.resets.Load(), "nothing is known")
		p.becomes("two")
		p.FailoverSuspected()
		p.work.Wait()
		require.EqualValues(t, 1, p.resets.Load())
	})
}

func TestRecheckOnceALeaseHasLapsed(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		p := newParts(t)
		p.LeaseRenewed()
		time.Sleep(lease)
		p.RecheckIfLeaseLapsed()
		require.Zero(t, p.rechecks.Load())
		time.Sleep(time.Nanosecond)
		for range 3 {
			p.RecheckIfLeaseLapsed()
			require.EqualValues(t, 1, p.rechecks.Load())
		}
		p.LeaseRenewed()
		p.RecheckIfLeaseLapsed()
		time.Sleep(lease + 1)
		p.RecheckIfLeaseLapsed()
		require.EqualValues(t, 2, p.rechecks.Load())
	})
}

func TestMirrorsAreMarkedOnceASecond(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		p := newParts(t)
		for range 10 {
			p.RedisAway()
			time.Sleep(250 * time.Millisecond)
		}
		require.EqualValues(t, 3, p.aways.Load())
	})
}
