package harness

import (
	"context"
	"errors"
	"strings"
	"sync/atomic"

	"github.com/redis/go-redis/v9"
	"github.com/stretchr/testify/require"

	"github.com/meshpresence/mesh"
)

// hlenHook counts the round trips with HLEN commands. It can make one command of a
// round trip fail.
type hlenHook struct {
	Trips atomic.Int32
	Fail  atomic.Pointer[string] // suffix of the key whose command fails
}

var errOfHook = errors.New("cut")

func (h *hlenHook) DialHook(next redis.DialHook) redis.DialHook { return next }

func (h *hlenHook) ProcessHook(next redis.ProcessHook) redis.ProcessHook { return next }

func (h *hlenHook) ProcessPipelineHook(next redis.ProcessPipelineHook) redis.ProcessPipelineHook {
	return func(ctx context.Context, cmds []redis.Cmder) error {
		if cmds[0].Name() == "hlen" {
			h.Trips.Add(1)
		}
		err := next(ctx, cmds)
		if end := h.Fail.Load(); end != nil {
			for _, cmd := range cmds {
				if cmd.Name() == "hlen" && strings.HasSuffix(cmd.Args()[1].(string), *end) {
					cmd.SetErr(errOfHook)
					err = errOfHook
				}
			}
		}
		return err
	}
}

// Counting starts a manager, and returns it with a hook on its Redis client.
func (w *World) Counting() (*mesh.PresenceManager, *hlenHook) {
	w.T.Helper()
	opts := w.Options()
	hook := new(hlenHook)
	opts.Redis.AddHook(hook)
	p, err := mesh.NewPresenceManager(opts)
	require.NoError(w.T, err)
	require.NoError(w.T, p.Start(w.T.Context()))
	w.T.Cleanup(func() { require.NoError(w.T, p.Shutdown(context.Background())) })
	return p, hook
}
