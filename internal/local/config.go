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
	Logger      *slog.Logger
}
