package redistest

import (
	"context"
	"errors"
	"fmt"
	"os/exec"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/redis/go-redis/v9"
)

const (
	// Slots is the number of hash slots of every cluster.
	Slots = 16384
	// NodeTimeout is the time of silence after which the nodes of a cluster begin to
	// agree that one of them has failed.
	NodeTimeout = 1200 * time.Millisecond

	shards       = 3
	clusterReady = 60 * time.Second // on a loaded machine
	clusterPoll  = 20 * time.Millisecond
)

// Cluster is a Redis Cluster that this process started: three shards of one master and
// one replica. With every failover, another of a shard's two nodes is the master. Methods
// end the test that started the cluster if they fail, so call them from its goroutine.
type Cluster struct {
	t     testing.TB
	nodes []*Server // the first masters, then their replicas in the same order

	mu     sync.Mutex // guards admins
	admins map[*Server]*redis.Client
}

// StartCluster starts a cluster on free ports, waits until every node says that it is
// complete, and stops it when the test is over. The options are for each node. It needs
// Redis 7, which has a setting for the port of the cluster bus. With an older one the
// test is skipped.
func StartCluster(t testing.TB, opts ...Option) *Cluster {
	t.Helper()
	if path, err := binary(); err == nil && !choosesBus(path) {
		t.Skip("redistest: this server has no cluster-port setting")
	}
	c := &Cluster{t: t, nodes: make([]*Server, 2*shards), admins: make(map[*Server]*redis.Client)}
	opts = append(opts, func(c *config) { c.node = true })
	for i := range c.nodes {
		c.nodes[i] = Start(t, opts...)
	}
	t.Cleanup(c.closeAdmins)
	c.form()
	return c
}

// choosesBus reports whether the server has the setting cluster-port.
func choosesBus(path string) bool {
	out, err := exec.Command(path, "--version").Output()
	if err != nil {
		return true // starting it will report the error
	}
	_, rest, ok := strings.Cut(string(out), "v=")
	major, _, _ := strings.Cut(rest, ".")
	n, err := strconv.Atoi(major)
	return !ok || err != nil || n >= 7
}

// clusterArgs returns the arguments of a node. A replica always stands for election,
// however old its data is, and stays with its master.
func clusterArgs(bus int) []string {
	return []string{
		"--cluster-enabled", "yes", "--cluster-port", strconv.Itoa(bus), "--cluster-config-file", "nodes.conf",
		"--cluster-node-timeout", strconv.FormatInt(NodeTimeout.Milliseconds(), 10),
		"--cluster-replica-validity-factor", "0", "--cluster-allow-replica-migration", "no",
		"--repl-diskless-sync-delay", "0", "--repl-backlog-size", "1mb",
	}
}

// form makes one cluster of the nodes.
func (c *Cluster) form() {
	c.t.Helper()
	first := c.nodes[0]
	ids := make([]string, len(c.nodes))
	for i, s := range c.nodes {
		ids[i] = c.do(s, "cluster", "myid").(string)
		c.do(s, "cluster", "set-config-epoch", i+1)
		if i < shards {
			c.do(s, "cluster", "addslotsrange", Slots*i/shards, Slots*(i+1)/shards-1)
		}
		if i > 0 {
			c.do(first, "cluster", "meet", "127.0.0.1", s.port, s.bus)
		}
	}
	c.await("nodes that know each other", func() error { return c.each(knowsAll) })
	for i := range shards {
		c.do(c.nodes[shards+i], "cluster", "replicate", ids[i])
	}
	c.AwaitStable()
}

// AwaitStable waits until every running node knows all others and finds all slots served,
// and every running replica follows a master.
func (c *Cluster) AwaitStable() {
	c.t.Helper()
	c.await("a complete cluster", func() error { return c.each(c.complete) })
}

// running returns the nodes that run.
func (c *Cluster) running() []*Server {
	var list []*Server
	for _, s := range c.nodes {
		s.mu.Lock()
		if s.proc != nil && !s.proc.ended() {
			list = append(list, s)
		}
		s.mu.Unlock()
	}
	return list
}

// each asks every running node.
func (c *Cluster) each(ask func(ctx context.Context, admin *redis.Client) error) error {
	ctx, cancel := context.WithTimeout(context.Background(), probeTimeout)
	defer cancel()
	for _, s := range c.running() {
		if err := ask(ctx, c.admin(s)); err != nil {
			return fmt.Errorf("%s: %w", s.Addr(), err)
		}
	}
	return nil
}

func knowsAll(ctx context.Context, admin *redis.Client) error {
	info, err := admin.ClusterInfo(ctx).Result()
	if err == nil && !strings.Contains(info, fmt.Sprintf("cluster_known_nodes:%d\r\n", 2*shards)) {
		err = errors.New("does not know all nodes")
	}
	return err
}

// complete returns an error that names the missing part of a node. It also counts the masters,
// because a node that has not noticed the death of a master finds everything in order.
func (c *Cluster) complete(ctx context.Context, admin *redis.Client) error {
	if err := knowsAll(ctx, admin); err != nil {
		return err
	}
	info, err := admin.ClusterInfo(ctx).Result()
	if err == nil && !strings.Contains(info, "cluster_state:ok") {
		err = errors.New("does not find the cluster in order")
	}
	if err != nil {
		return err
	}
	info, err = admin.Info(ctx, "replication").Result()
	if err == nil && strings.Contains(info, "role:slave") && !strings.Contains(info, "master_link_status:up") {
		err = errors.New("is a replica without a master")
	}
	if err != nil {
		return err
	}
	//lint:ignore SA1019 the newer command lists dead nodes too, and not the master first
	slots, err := admin.ClusterSlots(ctx).Result()
	if err != nil {
		return err
	}
	for _, s := range slots {
		if len(s.Nodes) == 0 || c.at(s.Nodes[0].Addr) == nil {
			return fmt.Errorf("slots from %d on have no running master", s.Start)
		}
	}
	return nil
}

// at returns the running node with an address.
func (c *Cluster) at(addr string) *Server {
	for _, s := range c.running() {
		if s.Addr() == addr {
			return s
		}
	}
	return nil
}

// await waits until ask returns nil.
func (c *Cluster) await(what string, ask func() error) {
	c.t.Helper()
	for began := time.Now(); ; time.Sleep(clusterPoll) {
		err := ask()
		if err == nil {
			return
		}
		if time.Since(began) > clusterReady {
			c.t.Fatalf("redistest: no %s within %v: %v", what, clusterReady, err)
		}
	}
}

// admin returns a client of one node, which follows no redirection.
func (c *Cluster) admin(s *Server) *redis.Client {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.admins[s] == nil {
		c.admins[s] = redis.NewClient(&redis.Options{
			Addr: s.Addr(), MaxRetries: -1, DialerRetries: 1, ContextTimeoutEnabled: true,
		})
	}
	return c.admins[s]
}

func (c *Cluster) closeAdmins() {
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, admin := range c.admins {
		if err := admin.Close(); err != nil {
			c.t.Error(err)
		}
	}
}

// do runs a command on one node.
func (c *Cluster) do(s *Server, args ...any) any {
	c.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), startTimeout)
	defer cancel()
	v, err := c.admin(s).Do(ctx, args...).Result()
	if err != nil {
		c.t.Fatalf("redistest: %s: %v: %v", s.Addr(), args, err)
	}
	return v
}

// Addrs returns the addresses of all nodes, running or not.
func (c *Cluster) Addrs() []string {
	addrs := make([]string, len(c.nodes))
	for i, s := range c.nodes {
		addrs[i] = s.Addr()
	}
	return addrs
}

// Client returns a new client that reads from masters only, closed when the test is over.
func (c *Cluster) Client(t testing.TB, setup ...func(*redis.ClusterOptions)) *redis.ClusterClient {
	t.Helper()
	opts := &redis.ClusterOptions{Addrs: c.Addrs()}
	for _, f := range setup {
		f(opts)
	}
	client := redis.NewClusterClient(opts)
	t.Cleanup(func() {
		if err := client.Close(); err != nil && !errors.Is(err, redis.ErrClosed) {
			t.Error(err)
		}
	})
	return client
}
