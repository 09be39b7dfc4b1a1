package local

import (
	"context"
	"log/slog"
	"time"

	"github.com/meshpresence/mesh/internal/clock"
	"github.com/meshpresence/mesh/internal/store"
)

// Store is the part of *store.Store that the registry uses.
type Store interface {
	Commit(ctx context.Context, bucket int, inc string, number, known uint64, ops []store.Op) ([]store.OpResult, error)
	OwnedPage(ctx context.Context, bucket int, inc string, cursor uint64) ([]store.EntryRef, uint64, error)
	OwnedSize(ctx context.Context, bucket int, inc string) (int64, error)
	ConnMetas(ctx context.Context, conns []string) ([]store.MetaValue, error)
	Check(ctx context.Context, bucket int, inc string, list store.CheckList) (store.Checked, error)
}

// Config configures a Registry. Fields without a default are required.
type Config struct {
	Store       Store
	Wheel       *clock.Wheel
	Buckets     int
	RoomBucket  func(room string) int
	ConnBucket  func(conn string) int
	Incarnation func() string
	// TTL returns the TTL of a room by its rules; 0: none.
	TTL func(room string) time.Duration
	// StateInterval returns the least interval between two states of one member of a
	// room; 0: no pacing. Defaults to 0.
	StateInterval func(room string) time.Duration
	// UserOf returns the user of a connection from its metadata, "" for none. It is called
	// once for each version of the metadata, for one version of a connection at a time,
	// and without a lock of the Conn. Defaults to nil: there are no users, and ops are
	// those of a registry without this field.
	UserOf func(conn string, meta []byte) string
	// Grace returns the time for which a room keeps the places of users whose last
	// connection has ended without asking to leave; 0: none. Defaults to 0.
	Grace func(room string) time.Duration
	// Caps returns the most members and users of a room; 0: no cap. Defaults to 0.
	Caps func(room string) (connections, users int)
	// RebuildFor is the Op.Rebuild of joins that write again what Redis has held.
	RebuildFor time.Duration
	// Kept is called when Redis has kept the place of an entry that ended, until a time
	// on the clock of Redis (unix ms), perhaps more than once. It must not block.
	Kept func(room, conn, entry, user string, until int64)
	// Full is called if a kept join (see Joined.Kept) or a return finds the room full. The
	// entry is no longer wanted. It must not block.
	Full func(c *Conn, room string, of store.Bound)
	// Replaced is called when a join of by has taken the place of conn, which may be the
	// connection itself. owner is the incarnation that owned it, store.NoOwner for a kept
	// place. If it is one of this server, conn has lost its entry already. pos is the
	// position of the room after the join. If the reply to the join is lost, Replaced is
	// called after the retry. It is not called if the connection leaves before the retry,
	// or if the retry runs under a new incarnation. It must not block.
	Replaced func(room, conn, owner string, by *Conn, pos store.Position)
	// BatchOps is the most ops of one call. Defaults to store.MaxOps.
	BatchOps int
	// Heartbeat is the interval between calls of Registry.Heartbeat. Defaults to 0:
	// unknown.
	Heartbeat time.Duration
	// MayReturn is called before an ended entry is joined again because its connection
	// gave a sign of life. If it returns false, the entry stays out until Conn.Return or
	// Conn.StayOut, and MayReturn is called again at each further frame. It runs with the
	// lock of the connection held, so it must not block or call the Conn. Defaults to
	// true.
	MayReturn func(c *Conn, room string) bool
	// EndSilent makes this server end its own entries after their TTL.
	EndSilent bool
	// MaxRooms is the most rooms of one connection; negative: no limit.
	MaxRooms int
	// Fenced is called if Redis refuses a batch of inc because inc is dead. It must not
	// block.
	Fenced func(inc string)
	// RenewLease is called if Redis has lost acknowledged writes, or everything. It must
	// not block.
	RenewLease func()
	// Answered returns the time at which Redis last answered a call of a bucket.
	// Optional.
	Answered func(bucket int) time.Time
	// OnPosition is called with the position that a room has reached by a write of this
	// server. It must not block.
	OnPosition func(room string, p store.Position)
	// MetaChanged is called after the metadata of a connection has changed, perhaps more
	// than once. It must not block.
	MetaChanged func(c *Conn)
	// UserMoved is called after MetaChanged if the connection belonged to another user
	// before. Optional. It must not block.
	UserMoved func(c *Conn)
	Logger    *slog.Logger
}
