package expired

import (
	"context"
	"errors"
	"log/slog"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/meshpresence/mesh/internal/errs"
	"github.com/meshpresence/mesh/internal/keys"
	"github.com/meshpresence/mesh/internal/store"
)

// fakeStore takes all writes, unless refusing is set, and holds the records of a test.
type fakeStore struct {
	mu       sync.Mutex // guards the fields below
	writes   store.Writes
	refusing bool
	tried    int
	records  map[string]store.Record // by room
	cleanUp  func(items []store.CleanUpItem) ([]store.CleanUpStatus, error)
	publish  func(payload string)
}

func (s *fakeStore) Writes(int) store.Writes {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.writes
}

func (s *fakeStore) TryWrite(context.Context, int) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.tried++
	now := time.Now()
	if s.refusing {
		s.writes.Failed, s.writes.Since = now, time.Time{}
		return store.ErrUnavailable
	}
	s.writes.Last, s.writes.Back = now, now
	if s.writes.Since.IsZero() {
		s.writes.Since = now
	}
	return nil
}

func (s *fakeStore) Records(_ context.Context, refs []store.EntryRef) ([]store.Record, error) {
	list := make([]store.Record, len(refs))
	for i, ref := range refs {
		list[i] = s.records[ref.Room]
	}
	return list, nil
}

func (s *fakeStore) CleanUp(_ context.Context, _ store.ClockProof, items []store.CleanUpItem) ([]store.CleanUpStatus, error) {
	return s.cleanUp(items)
}

func (s *fakeStore) Publish(ctx context.Context, _, payload string) (int64, error) {
	if err := ctx.Err(); err != nil {
		return 0, err
	}
	s.publish(payload)
	return 1, nil
}

// inContact is the lease of a server that may end entries of others.
type inContact struct{}

func (inContact) ClockProof() (store.ClockProof, bool) { return store.ClockProof{}, true }
func (inContact) ClockRefused(time.Duration)           {}

func newQueue(s *fakeStore) *Queue {
	return New(Config{
		Store: s, Lease: inContact{}, Owns: func(conn string) bool { return conn == "own" },
		Watches: func(room string) bool { return room == "watched" }, Bucket: func(string) int { return 0 },
		Look: func(context.Context) error { return nil }, Channel: "ended", Logger: slog.New(slog.DiscardHandler),
	})
}

func TestQueueAddsOnlyHintsOfOthers(t *testing.T) {
	t.Parallel()
	q := newQueue(&fakeStore{})
	for _, e := range []keys.Expired{
		{Kind: keys.ConnExpired, Room: "room", Conn: "own"},
		{Kind: keys.StateExpired, Room: "room", Conn: "c"},
	} {
		q.Add(e)
		assert.Zero(t, q.Stats().Waiting, e)
	}
	q.Add(keys.Expired{Kind: keys.StateExpired, Room: "watched", Conn: "c"})
	q.Add(keys.Expired{Kind: keys.ConnExpired, Room: "room", Conn: "c"})
	q.Add(keys.Expired{Kind: keys.ConnExpired, Room: "room", Conn: "c"})
	assert.Equal(t, 2, q.Stats().Waiting)
}

// A message names rooms as they are, and concerns no other hint.
func TestQueueForgetsWhatOthersEnded(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		q := newQueue(&fakeStore{})
		q.Start(t.Context())
		defer q.Stop()
		q.Add(keys.Expired{Kind: keys.ConnExpired, Room: "a room: with words", Conn: "c1"})
		q.Add(keys.Expired{Kind: keys.ConnExpired, Room: "other", Conn: "c1"})
		for _, note := range []string{"", "\n", "c", "c c1", "c c2 other\n", "s c1 other\n", "c  c1 other\n", "cc c1 other\n"} {
			q.HandleEnded(note)
			require.Equal(t, 2, q.Stats().Waiting, "%q", note)
		}
		q.HandleEnded("c c9 room\nc c1 a room: with words\n")
		require.Equal(t, 1, q.Stats().Waiting)
		time.Sleep(2 * time.Second) // Redis has no record of the other
		require.Zero(t, q.Stats())
	})
}

// Hints that only wait for a write are not looked through all the time: there may be
// thousands, and the write may hang.
func TestHintsThatAwaitAWriteCostLittle(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		s := &fakeStore{}
		q := newQueue(s)
		q.enqueue(keys.Expired{Kind: keys.ConnExpired, Room: "room", Conn: "c1"}, 0, false)
		time.Sleep(ownersTurn + maxLead)
		require.NoError(t, s.TryWrite(t.Context(), 0))
		due, next := q.due(t.Context(), time.Now().Add(confirmed))
		require.Empty(t, due, "the newest success is too old")
		require.Equal(t, lookInterval, next)
		due, _ = q.due(t.Context(), time.Now())
		require.Len(t, due, 1)
		q.trials.work.Wait()
	})
}

// If Redis refuses a part of a batch, the rest is ended, counted and told.
func TestQueueEndsTheRestIfOneIsRefused(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		var told string
		s := &fakeStore{records: map[string]store.Record{}, publish: func(payload string) { told += payload }}
		s.cleanUp = func(items []store.CleanUpItem) ([]store.CleanUpStatus, error) {
			statuses := make([]store.CleanUpStatus, len(items))
			for i, item := range items {
				if item.Room != "odd" {
					statuses[i] = store.Ended
				}
			}
			return statuses, errors.New("a key of another type")
		}
		q := newQueue(s)
		var due []hint
		for _, room := range []string{"a", "odd", "z"} {
			s.records[room] = store.Record{Conn: "c", Entry: "E", Incarnation: "I"}
			due = append(due, hint{keys.Expired{Kind: keys.ConnExpired, Room: room, Conn: "c"}, queued{learned: time.Now()}})
		}
		time.Sleep(ownersTurn)
		require.NoError(t, s.TryWrite(t.Context(), 0))
		q.act(t.Context(), due)
		require.Equal(t, Stats{Used: 2, Dropped: 1}, q.Stats())
		require.Equal(t, "c c a\nc c z\n", told)
	})
}

func TestQueueDropsHintsAfterAFailover(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		q := newQueue(&fakeStore{})
		q.PauseUntil(time.Now().Add(time.Minute))
		require.True(t, q.Paused())
		q.act(t.Context(), make([]hint, 3))
		require.Equal(t, Stats{Dropped: 3}, q.Stats())
		time.Sleep(time.Minute)
		require.False(t, q.Paused())
	})
}

// A late message may meet a hint about a connection that has joined again and expired
// since. So a server that was held up after its look sends none.
func TestPeersAreNotNotifiedLate(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		to := newQueue(&fakeStore{})
		from := newQueue(&fakeStore{publish: to.HandleEnded})
		e := keys.Expired{Kind: keys.ConnExpired, Room: "room", Conn: "c1"}
		to.Add(e)
		from.notifyPeers(t.Context(), []keys.Expired{e}, time.Now().Add(-notifyWithin))
		require.Equal(t, 1, to.Stats().Waiting)
		from.notifyPeers(t.Context(), []keys.Expired{e}, time.Now().Add(time.Millisecond-notifyWithin))
		require.Zero(t, to.Stats().Waiting)
	})
}

func TestCleanerGivesUp(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		items := []store.CleanUpItem{{Room: "room", Conn: "c"}}
		s := &fakeStore{refusing: true}
		_, err := Cleaner{Store: s, Lease: inContact{}, Life: t.Context()}.CleanUp(t.Context(), 0, items)
		require.ErrorIs(t, err, store.ErrUnavailable)
		require.LessOrEqual(t, s.tried, int(unwritableLimit/tryEvery)+1)

		life, end := context.WithCancel(t.Context())
		end()
		_, err = Cleaner{Store: s, Lease: inContact{}, Life: life}.CleanUp(t.Context(), 0, items)
		require.ErrorIs(t, err, errs.Closed)
		_, err = Cleaner{Store: s, Lease: inContact{}, Life: t.Context()}.CleanUp(life, 0, items)
		require.ErrorIs(t, err, context.Canceled)

		s = &fakeStore{cleanUp: func([]store.CleanUpItem) ([]store.CleanUpStatus, error) {
			return []store.CleanUpStatus{store.Ended}, nil
		}}
		began := time.Now()
		n, err := Cleaner{Store: s, Lease: inContact{}, Life: t.Context()}.CleanUp(t.Context(), 0, items)
		require.NoError(t, err)
		require.Equal(t, 1, n)
		require.GreaterOrEqual(t, time.Since(began), ownersTurn)
	})
}
