package mesh

import (
	"context"
	"fmt"

	"github.com/redis/go-redis/v9"

	"github.com/meshpresence/mesh/internal/limit"
)

const (
	defaultConnections = 100_000
	// fewConnections is the number of connections that a server should be able to hold at
	// least: if file descriptors allow fewer, that is logged as a warning.
	fewConnections = 10_000

	// spareFiles and one in every spareShare descriptors are left to the app, to
	// listeners, to Sentinel clients, and to requests that are being refused.
	spareFiles = 64
	spareShare = 16
	// One in redisShare is the most that Redis gets. A client may be allowed more
	// connections than there are descriptors; it makes only those that it needs.
	redisShare = 2
	// subscriptionConns are the connections to each Redis node for
	// subscriptions: to events, and to expired keys.
	subscriptionConns = 2
)

// fitConnections bounds the number of connections by the descriptors that this
// process may have open. Otherwise sockets could take all of them, and after a
// restart of Redis its client could never connect again. An explicit limit that
// does not fit is an error.
func (s *Server) fitConnections(ctx context.Context) error {
	o := &s.n.opts
	files, known := limit.OpenFiles()
	if o.files != nil {
		files, known = o.files()
	}
	if !known {
		return nil
	}
	nodes, err := s.n.store.Nodes(ctx)
	if err != nil {
		return err
	}
	reserved := spareFiles + files/spareShare + min(nodes*redisConnections(o.Redis), files/redisShare)
	fit := files - reserved
	switch {
	case fit < 1:
		return fmt.Errorf("%w: this process may open %d files (ulimit -n), of which Redis and the app need %d: raise that", ErrInvalidOptions, files, reserved)
	case s.chosen && over(o.Limits.Connections, fit):
		return fmt.Errorf("%w: Limits.Connections is %d, but this process may open %d files (ulimit -n), of which Redis and the app need %d: set it to at most %d, or raise that",
			ErrInvalidOptions, o.Limits.Connections, files, reserved, fit)
	case o.Limits.Connections >= 0 && o.Limits.Connections <= fit:
		return nil
	}
	s.mu.Lock()
	told := s.most == fit // an earlier attempt to start has said so
	s.most = fit
	s.mu.Unlock()
	if told {
		return nil
	}
	report := o.Logger.Info
	if fit < fewConnections {
		report = o.Logger.Warn
	}
	report("mesh: the limit of open files bounds the number of connections", "connections", fit, "files", files,
		"remedy", "raise ulimit -n, or set Limits.Connections")
	return nil
}

// redisConnections returns how many connections a client may have to each node.
func redisConnections(client redis.UniversalClient) int {
	pool, pipelines := 0, 0
	switch c := client.(type) {
	case *redis.Client:
		pool, pipelines = c.Options().PoolSize, c.Options().PipelinePoolSize
	case *redis.ClusterClient:
		pool, pipelines = c.Options().PoolSize, c.Options().PipelinePoolSize
	}
	if pipelines <= 0 {
		pipelines = redis.DefaultPipelinePoolSize
	}
	return pool + pipelines + subscriptionConns
}
