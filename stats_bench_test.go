package mesh_test

import (
	"context"
	"errors"
	"fmt"
	"regexp"
	"slices"
	"strconv"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/meshpresence/mesh"
	"github.com/meshpresence/mesh/internal/store"
	"github.com/meshpresence/mesh/internal/testhook"
)

const (
	statsConns = 100_000
	statsRooms = 10_000
)

func statsRoom(i int) string { return "room" + strconv.Itoa(i%statsRooms) }

// busyManager is a manager with 100,000 connections, each in one of 10,000
// rooms, all of which are watched. It returns where the rooms stand.
func busyManager(b *testing.B) (*mesh.PresenceManager, []store.Position) {
	b.Helper()
	off := false
	p, err := mesh.NewPresenceManager(mesh.Options{Redis: benchRedis(b), EnablePresenceExpirationEvents: &off})
	require.NoError(b, err)
	require.NoError(b, p.TrackPresence(mesh.Regexp(regexp.MustCompile(".*")), mesh.PresenceOptions{}))
	require.NoError(b, p.Start(b.Context()))
	b.Cleanup(func() { require.NoError(b, p.Shutdown(context.Background())) })
	var callers sync.WaitGroup
	for worker := range benchCallers {
		callers.Go(func() {
			for i := worker; i < statsConns; i += benchCallers {
				id := "conn" + strconv.Itoa(i)
				if err := p.Connect(b.Context(), id, nil); err != nil {
					b.Error(err)
				}
				// On a busy machine it may take its time; it goes on being wanted.
				if err := p.Join(b.Context(), statsRoom(i), id); err != nil && !errors.Is(err, mesh.ErrUnavailable) {
					b.Error(err)
				}
			}
		})
	}
	callers.Wait()
	require.Eventually(b, func() bool { return p.Stats().Unwritten == 0 }, time.Minute, 10*time.Millisecond)
	ctx, stop := context.WithCancel(b.Context())
	var watchers, ready sync.WaitGroup
	b.Cleanup(func() { stop(); watchers.Wait() })
	rooms := make([]string, statsRooms)
	for i := range rooms {
		rooms[i] = statsRoom(i)
		ready.Add(1)
		watchers.Go(func() {
			begun := sync.OnceFunc(ready.Done)
			for range p.Subscribe(ctx, rooms[i], mesh.SubscribeOptions{}) {
				begun()
			}
		})
	}
	ready.Wait()
	at, err := testhook.PartsOf(p).Store.Positions(b.Context(), rooms)
	require.NoError(b, err)
	return p, at
}

// BenchmarkStats is what a call of Stats costs on such a server, and what it
// holds up: one event of one room after the other is delivered to its
// subscriber, with nobody calling Stats and with somebody who does nothing
// else. An app calls it every few seconds.
func BenchmarkStats(b *testing.B) {
	p, at := busyManager(b)
	require.Equal(b, statsConns, p.Stats().Entries)
	b.Run("call", func(b *testing.B) {
		for b.Loop() {
			p.Stats()
		}
	})
	n := 0
	deliver := func(b *testing.B) {
		var took []time.Duration
		for b.Loop() {
			i := n % statsRooms
			next := store.Position{Epoch: at[i].Epoch, Seq: at[i].Seq + 1, Tag: fmt.Sprintf("b%d", n)}
			event := forged(next.Epoch, next.Seq, next.Tag, at[i].Tag, "conn"+strconv.Itoa(i))
			began := time.Now()
			testhook.PartsOf(p).Hub.HandleEvent(statsRoom(i), event)
			took = append(took, time.Since(began))
			at[i] = next
			n++
		}
		slices.Sort(took)
		b.ReportMetric(float64(took[len(took)*999/1000].Microseconds()), "µs/p99.9")
		b.ReportMetric(float64(took[len(took)-1].Microseconds()), "µs/max")
	}
	b.Run("deliver alone", deliver)
	b.Run("deliver beside", func(b *testing.B) {
		stop := make(chan struct{})
		var calls sync.WaitGroup
		calls.Go(func() {
			for {
				select {
				case <-stop:
					return
				default:
					p.Stats()
				}
			}
		})
		deliver(b)
		close(stop)
		calls.Wait()
	})
	require.Zero(b, p.Stats().Repairs["fork"], "the events were what they should be")
}
