package admission

import (
	"fmt"

	"github.com/meshpresence/mesh/internal/errs"
)

const (
	// fewConnections is the number of connections that a server should be able to hold at
	// least. If file descriptors allow fewer, Fit logs a warning.
	fewConnections = 10_000

	// spareFiles and one in every spareShare descriptors are left to the app, to
	// listeners, to Sentinel clients, and to requests that are being refused.
	spareFiles = 64
	spareShare = 16
	// Redis gets one in redisShare descriptors at most. A client may be allowed more
	// connections than there are descriptors; it makes only those that it needs.
	redisShare = 2
)

// Fit lowers the limit of connections so that they fit into the files that this process
// may open, beside the given number of connections to Redis. Otherwise sockets could take
// all descriptors, and after a restart of Redis the client could never connect again. If
// the app has chosen a limit that does not fit, Fit changes nothing and returns an error
// that says how to solve it.
func (g *Gate) Fit(files, redis int) error {
	reserved := spareFiles + files/spareShare + min(redis, files/redisShare)
	fit := files - reserved
	switch {
	case fit < 1:
		return fmt.Errorf("%w: this process may open %d files (ulimit -n), of which Redis and the app need %d: raise that",
			errs.InvalidOptions, files, reserved)
	case g.cfg.Chosen && g.cfg.Max >= 0 && g.cfg.Max > fit:
		return fmt.Errorf("%w: Limits.Connections is %d, but this process may open %d files (ulimit -n), of which Redis and the app need %d: set it to at most %d, or raise that",
			errs.InvalidOptions, g.cfg.Max, files, reserved, fit)
	case g.cfg.Max >= 0 && g.cfg.Max <= fit:
		return nil
	}
	if !g.setMax(fit) {
		return nil // an earlier attempt to start has logged it
	}
	report := g.cfg.Logger.Info
	if fit < fewConnections {
		report = g.cfg.Logger.Warn
	}
	report("mesh: the limit of open files bounds the number of connections", "connections", fit, "files", files,
		"remedy", "raise ulimit -n, or set Limits.Connections")
	return nil
}
