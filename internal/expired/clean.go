package expired

import (
	"context"
	"errors"
	"slices"
	"time"

	"github.com/meshpresence/mesh/internal/errs"
	"github.com/meshpresence/mesh/internal/store"
	"github.com/meshpresence/mesh/internal/wait"
)

const (
	// cleanUpBatchSize is the number of entries that end on one clock proof, which holds
	// for a short time only.
	cleanUpBatchSize = 4 * store.MaxOps
	// cleanUpStep is the pause between two looks whether the owners' turn is over.
	cleanUpStep = 50 * time.Millisecond
	// unwritableLimit is the time without a successful write after which CleanUp gives up.
	unwritableLimit = 1900 * time.Millisecond
)

// Cleaner ends expired entries of other servers for a caller that waits. It is safe for
// concurrent use.
type Cleaner struct {
	Store Store
	Lease Lease
	// Life ends when the server stops. Calls then return ErrClosed.
	Life context.Context
	// Kept is called for each entry whose place is kept, as in Config. It may be nil.
	Kept func(room, conn, entry string, until int64)
}

// CleanUp ends entries of other servers whose keys have just been missing. All of them
// are in one bucket. It waits for the owners' turn, and until this server may end entries
// of others, and returns the number of those that it has ended. Entries whose places are
// kept do not count.
func (c Cleaner) CleanUp(ctx context.Context, bucket int, items []store.CleanUpItem) (ended int, err error) {
	learned := time.Now()
	for part := range slices.Chunk(items, cleanUpBatchSize) {
		some, err := c.cleanUpBatch(ctx, bucket, learned, part)
		ended += some
		if err != nil {
			return ended, err
		}
	}
	return ended, nil
}

func (c Cleaner) cleanUpBatch(ctx context.Context, bucket int, learned time.Time, items []store.CleanUpItem) (ended int, err error) {
	for {
		if err := c.awaitOwnersTurn(ctx, bucket, learned); err != nil {
			return ended, err
		}
		if proof, ok := c.Lease.ClockProof(); ok {
			sent := time.Now()
			statuses, err := c.Store.CleanUp(ctx, proof, items)
			for i, s := range statuses {
				switch s {
				case store.Ended:
					ended++
				case store.PlaceKept:
					tellKept(c.Kept, &items[i])
				}
			}
			if !errors.Is(err, store.ErrClock) {
				return ended, err
			}
			c.Lease.ClockRefused(time.Since(sent))
		}
		if err := c.pause(ctx); err != nil {
			return ended, err
		}
	}
}

// awaitOwnersTurn waits until the owners in a bucket have had their turn to refresh keys
// that were missing at the given time. It returns ErrUnavailable if Redis takes no writes
// for unwritableLimit.
func (c Cleaner) awaitOwnersTurn(ctx context.Context, bucket int, learned time.Time) error {
	began, tried := time.Now(), time.Time{}
	for {
		now := time.Now()
		w := c.Store.Writes(bucket)
		switch {
		case mayAct(w, learned, ownersTurn, 0, now):
			return nil
		case w.Since.IsZero() && now.Sub(began) >= unwritableLimit && now.Sub(w.Back) >= unwritableLimit:
			return store.ErrUnavailable
		case now.Sub(tried) >= tryEvery && now.Sub(w.Back) >= tryEvery/2:
			tried = now
			short, cancel := context.WithTimeout(ctx, tryWithin)
			_ = c.Store.TryWrite(short, bucket) // Writes has the outcome
			cancel()
			continue
		}
		if err := c.pause(ctx); err != nil {
			return err
		}
	}
}

// pause waits for cleanUpStep. It returns an error if ctx or the server ends.
func (c Cleaner) pause(ctx context.Context) error {
	either, cancel := context.WithCancel(ctx)
	defer cancel()
	defer context.AfterFunc(c.Life, cancel)()
	if wait.For(either, cleanUpStep) == nil {
		return nil
	}
	if err := ctx.Err(); err != nil {
		return err
	}
	return errs.Closed
}
