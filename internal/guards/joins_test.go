package guards

import (
	"context"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/meshpresence/mesh/internal/callbacks"
	"github.com/meshpresence/mesh/internal/clock"
	"github.com/meshpresence/mesh/internal/errs"
	"github.com/meshpresence/mesh/internal/local"
	"github.com/meshpresence/mesh/internal/store"
)

// willingStore takes every write at once.
type willingStore struct{}

func (willingStore) Commit(_ context.Context, _ int, _ string, _, _ uint64, ops []store.Op) ([]store.OpResult, error) {
	results := make([]store.OpResult, len(ops))
	for i := range results {
		results[i].Status = store.Done
	}
	return results, nil
}

func (willingStore) OwnedPage(context.Context, int, string, uint64) ([]store.EntryRef, uint64, error) {
	return nil, 0, nil
}

func (willingStore) OwnedSize(context.Context, int, string) (int64, error) { return 0, nil }

func (willingStore) ConnMetas(_ context.Context, conns []string) ([]store.MetaValue, error) {
	return make([]store.MetaValue, len(conns)), nil
}

func (willingStore) Check(context.Context, int, string, store.CheckList) (store.Checked, error) {
	return store.Checked{}, nil
}

// joinRig holds Joins with one connection.
type joinRig struct {
	*Joins
	rules RuleSet
	reg   *local.Registry
	conn  *local.Conn
}

// withJoins runs a test in virtual time.
func withJoins(t *testing.T, test func(t *testing.T, r *joinRig)) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		r := &joinRig{}
		calls := callbacks.New(t.Context(), callbacks.Config{})
		cache := NewCache(Config{Rules: &r.rules, Calls: calls, GuardTimeout: 5 * time.Second, JoinTimeout: 5 * time.Second})
		wheel := clock.NewWheel(50 * time.Millisecond)
		zero := func(string) int { return 0 }
		r.Joins = NewJoins(JoinConfig{
			Cache: cache, Rules: &r.rules, Context: t.Context(), OnTakenOut: func(string, string) {},
			Conn:    func(id string) (*local.Conn, bool) { return r.reg.Conn(id) },
			ToError: func(_ context.Context, err error) error { return err },
			Member: func(string) MemberFunc {
				return func() (Member, uint64) {
					meta, version := r.conn.Metadata()
					return Member{ID: "c", Metadata: meta}, version
				}
			},
		})
		r.reg = local.New(local.Config{
			Store: willingStore{}, Wheel: wheel, Buckets: 1, RoomBucket: zero, ConnBucket: zero, MaxRooms: -1,
			Incarnation: func() string { return "i" }, TTL: func(string) time.Duration { return 0 }, MayReturn: r.MayReturn,
			Fenced: func(string) {}, RenewLease: func() {}, OnPosition: func(string, store.Position) {}, MetaChanged: func(*local.Conn) {},
		})
		wheel.Start()
		defer wheel.Stop()
		defer r.reg.Stop()
		defer r.Close()
		var err error
		r.conn, err = r.reg.Connect("c", nil, nil, func() { cache.AddConn("c") })
		require.NoError(t, err)
		test(t, r)
		require.NoError(t, calls.Close(t.Context()))
	})
}

// joinGuard adds a join guard for the room "lobby".
func (r *joinRig) joinGuard(f Func) { r.rules.Add(Pattern{Exact: "lobby"}, Options{JoinGuard: f}) }

func never(context.Context, Member, string) (bool, error) { return false, nil }

// A ban between the yes of the guard and the join is noticed.
func TestABanBetweenTheYesAndTheJoin(t *testing.T) {
	t.Parallel()
	for name, ban := range map[string]func(ctx context.Context, r *joinRig) error{
		"Leave": func(ctx context.Context, r *joinRig) error {
			_, err := r.Leave(ctx, r.conn, "lobby", store.CauseLeft)
			return err
		},
		"TakeOutOf":  func(_ context.Context, r *joinRig) error { r.TakeOutOf("lobby"); return nil },
		"TakeOutAll": func(_ context.Context, r *joinRig) error { r.TakeOutAll(r.conn); return nil },
		"Recheck":    func(_ context.Context, r *joinRig) error { r.Recheck(r.conn, "lobby"); return nil },
		"RecheckAll": func(_ context.Context, r *joinRig) error { r.RecheckAll(r.conn); return nil },
		"RecheckOf":  func(_ context.Context, r *joinRig) error { r.RecheckOf("lobby"); return nil },
		"metadata":   func(_ context.Context, r *joinRig) error { r.conn.SetMeta(7, []byte("1")); return nil },
		"rule":       func(_ context.Context, r *joinRig) error { r.joinGuard(never); return nil },
	} {
		t.Run(name, func(t *testing.T) {
			withJoins(t, func(t *testing.T, r *joinRig) {
				ctx := t.Context()
				var asked atomic.Int64
				r.joinGuard(func(context.Context, Member, string) (bool, error) { return asked.Add(1) == 1, nil })
				q := &joinQuestion{conn: r.conn, room: "lobby"}
				require.NoError(t, r.begin(q))
				defer r.unregister(q)
				err := r.ask(ctx, q, false, func(answer error) error {
					if answer != nil {
						return answer
					}
					require.NoError(t, ban(ctx, r))
					_, err := r.conn.JoinIf(ctx, "lobby", local.JoinOptions{
						Within: time.Second, Accept: func(meta uint64) error { return r.answer(q, meta) },
					})
					return err
				})
				require.ErrorIs(t, err, errs.Refused)
				require.False(t, r.conn.In("lobby"))
			})
		})
	}
}

// A recheck that comes when an earlier one has its answer, but has not ended yet, is not
// lost.
func TestARecheckAtTheEndOfAnother(t *testing.T) {
	withJoins(t, func(t *testing.T, r *joinRig) {
		ctx := t.Context()
		var banned atomic.Bool
		r.joinGuard(func(context.Context, Member, string) (bool, error) { return !banned.Load(), nil })
		_, err := r.Join(ctx, r.conn, "lobby", Request{Within: func() time.Duration { return time.Second }})
		require.NoError(t, err)
		q := &joinQuestion{conn: r.conn, room: "lobby", kind: askedRecheck}
		require.NoError(t, r.begin(q))
		r.askAgain(q)
		require.True(t, r.conn.In("lobby"))
		banned.Store(true)
		r.Recheck(r.conn, "lobby")
		require.False(t, r.unregisterUnlessStale(q))
		r.askAgain(q)
		require.True(t, r.unregisterUnlessStale(q))
		assert.False(t, r.conn.In("lobby"))
		assert.Zero(t, r.Open())
	})
}

// The app lets a connection in between the no of the guard and its leave. The connection
// is in then, and its join says so.
func TestAddBetweenTheNoAndTheLeave(t *testing.T) {
	withJoins(t, func(t *testing.T, r *joinRig) {
		ctx := t.Context()
		r.joinGuard(never)
		q := &joinQuestion{conn: r.conn, room: "lobby"}
		require.NoError(t, r.begin(q))
		defer r.unregister(q)
		err := r.ask(ctx, q, false, func(answer error) error {
			if answer == nil {
				return nil
			}
			_, err := r.Add(ctx, r.conn, "lobby", false)
			require.NoError(t, err)
			_, err = r.exclude(ctx, q, answer)
			return err
		})
		require.NoError(t, err)
		assert.True(t, r.conn.In("lobby"))
	})
}
