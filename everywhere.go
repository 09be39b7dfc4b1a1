package mesh

import (
	"context"
	"errors"
	"slices"
	"sync"
)

// everywhere carries out a call about a room on all servers: this one, those that
// hold entries of the room, and all others that live, since they may have
// subscribers of it or joins that wait. It returns what failed; the others have
// carried it out.
func (n *node) everywhere(ctx context.Context, call remoteCall) error {
	servers := []string{n.lease.Incarnation()}
	homes, noHomes := n.store.Homes(ctx, call.Room)
	living, _, noList := n.store.Instances(ctx, maxServers)
	if ctx.Err() != nil {
		return contextError(ctx) // the caller does not want it any more
	}
	servers = append(servers, homes...)
	for _, one := range living {
		if !one.Dead {
			servers = append(servers, one.Incarnation)
		}
	}
	slices.Sort(servers)
	servers = slices.Compact(servers)
	errs := make([]error, len(servers), len(servers)+2)
	var calls sync.WaitGroup
	for i, inc := range servers {
		there := func(context.Context) (string, error) { return inc, nil }
		calls.Go(func() { _, errs[i] = n.control.call(ctx, there, call) })
	}
	calls.Wait()
	return errors.Join(append(errs, n.errorFor(ctx, noHomes), n.errorFor(ctx, noList))...)
}
