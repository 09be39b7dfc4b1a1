package peers

import (
	"context"
	"errors"
	"slices"
	"sync"
	"sync/atomic"

	"github.com/meshpresence/mesh/internal/errs"
)

// CallAll carries out a call about a room on all servers: see forEach.
func (p *Peers) CallAll(ctx context.Context, call Call) error {
	return p.forEach(ctx, call.Room, func(incarnation string) error {
		_, err := p.Call(ctx, At(incarnation), call)
		return err
	})
}

// Clear takes all connections of all servers out of a room, and returns the number of
// those that have left, even if it fails.
func (p *Peers) Clear(ctx context.Context, room string) (removed int, err error) {
	var sum atomic.Int64
	err = p.forEach(ctx, room, func(incarnation string) error { return p.clearAt(ctx, incarnation, room, &sum) })
	return int(sum.Load()), err
}

// clearAt lets one server clear a room, part after part. It goes on as long as there is
// progress, because with a busy Redis a part may take longer than a call.
func (p *Peers) clearAt(ctx context.Context, incarnation, room string, removed *atomic.Int64) error {
	call := Call{Op: OpClear, Room: room, Paged: true}
	for {
		result, err := p.Call(ctx, At(incarnation), call)
		removed.Add(int64(result.Count))
		switch {
		case err != nil && (result.Count == 0 || ctx.Err() != nil):
			return err
		case err == nil && result.After == "":
			return nil
		case result.After != "":
			call.After = result.After
		}
	}
}

// forEach calls do for every server that a room may concern: this one, those that have
// entries of the room, and all others that are alive, because they may have subscribers
// or waiting joins. It returns all errors. The other servers have carried out the call.
func (p *Peers) forEach(ctx context.Context, room string, do func(incarnation string) error) error {
	var (
		owners, living      []string
		noOwners, noServers error
		reads               sync.WaitGroup
	)
	reads.Go(func() { owners, noOwners = p.cfg.Owners(ctx, room) })
	reads.Go(func() { living, noServers = p.cfg.Servers(ctx) })
	reads.Wait()
	if ctx.Err() != nil {
		return errs.Ended(ctx)
	}
	servers := slices.Concat([]string{p.cfg.Incarnation()}, owners, living)
	slices.Sort(servers)
	servers = slices.Compact(servers)
	failed := make([]error, len(servers), len(servers)+2)
	var calls sync.WaitGroup
	for i, incarnation := range servers {
		calls.Go(func() { failed[i] = do(incarnation) })
	}
	calls.Wait()
	return errors.Join(append(failed, p.cfg.ToError(ctx, noOwners), p.cfg.ToError(ctx, noServers))...)
}
