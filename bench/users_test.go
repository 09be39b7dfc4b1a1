package bench

import (
	"fmt"
	"testing"

	"github.com/centrifugal/centrifuge"
	"github.com/redis/go-redis/v9"
	"github.com/stretchr/testify/require"

	"github.com/meshpresence/mesh"
	"github.com/meshpresence/mesh/bench/internal/peer"
	"github.com/meshpresence/mesh/internal/redistest"
)

// joinsAndLeaves are the ways to join and leave rooms that BenchmarkUsers compares. The
// first one is the library without any feature of users.
var joinsAndLeaves = []struct {
	kind peer.Kind
	run  func(*testing.B, *redis.Client) float64
}{
	{peer.Mesh, meshThrong(mesh.PresenceOptions{}, false)},
	{"max-connections", meshThrong(mesh.PresenceOptions{MaxConnections: 1000}, false)},
	{"users", meshThrong(mesh.PresenceOptions{}, true)},
	{"users-caps", meshThrong(mesh.PresenceOptions{MaxConnections: 1000, MaxUsers: 1000}, true)},
	{"users-grace", meshThrong(mesh.PresenceOptions{Grace: entryTTL}, true)},
	{"reload", meshReloads(mesh.PresenceOptions{})},
	{"reload-grace", meshReloads(mesh.PresenceOptions{Grace: entryTTL})},
	{peer.Centrifuge, centrifugeManager},
	{"centrifuge-map", mapThrong},
}

// BenchmarkUsers measures joins and leaves of 512 callers in 1,000 rooms with each feature
// of users, beside Centrifuge's presence manager and its map broker in recoverable mode.
// In a reload, a connection ends without leaving, and another one of its user joins: with
// grace it takes the place. The figures of each are operations per second, and Redis's
// processor time and commands for each.
func BenchmarkUsers(b *testing.B) {
	rounds, cpu, commands := figures{}, figures{}, figures{}
	for b.Loop() {
		for _, j := range joinsAndLeaves {
			client := redistest.Start(b).Client(b)
			perSecond := j.run(b, client)
			ops, used := perSecond*during.Seconds(), usage(b, client)
			all := int64(0)
			for _, n := range used.Commands {
				all += n
			}
			rounds[j.kind] = append(rounds[j.kind], perSecond)
			cpu[j.kind] = append(cpu[j.kind], used.CPU*1e6/ops)
			commands[j.kind] = append(commands[j.kind], float64(all)/ops)
		}
	}
	for _, j := range joinsAndLeaves {
		b.ReportMetric(rounds.median(j.kind), string(j.kind)+"-ops/s")
		b.ReportMetric(cpu.median(j.kind), string(j.kind)+"-redis-µs/op")
		b.ReportMetric(commands.median(j.kind), string(j.kind)+"-commands/op")
	}
	b.ReportMetric(cpu.ratio("users", peer.Mesh), "users-×mesh")
	b.ReportMetric(cpu.ratio("users-grace", peer.Mesh), "users-grace-×mesh")
	b.ReportMetric(cpu.ratio("reload-grace", "reload"), "reload-grace-×reload")
	b.ReportMetric(rounds.ratio("users-grace", peer.Centrifuge), "×centrifuge")
	b.ReportMetric(rounds.ratio("users-grace", "centrifuge-map"), "×centrifuge-map")
}

// metadataOf returns metadata with the user of a connection of throng.
func metadataOf(conn string) map[string]string { return map[string]string{"userId": "user-" + conn} }

func usersOptions(client *redis.Client, users bool) mesh.Options {
	opts := mesh.Options{Redis: client}
	if users {
		opts.UserID = mesh.UserIDField("userId")
	}
	return opts
}

func meshThrong(rule mesh.PresenceOptions, users bool) func(*testing.B, *redis.Client) float64 {
	return func(b *testing.B, client *redis.Client) float64 {
		p := startManager(b, usersOptions(client, users), rule)
		ctx := b.Context()
		for i := range callers {
			conn := fmt.Sprintf("conn%d", i)
			require.NoError(b, p.Connect(ctx, conn, metadataOf(conn)))
		}
		return throng(b,
			func(room, conn string) error { return p.Join(ctx, room, conn) },
			func(room, conn string) error { _, err := p.Leave(ctx, room, conn); return err })
	}
}

// meshReloads makes each caller a page that is reloaded all the time: its connections
// take turns.
func meshReloads(rule mesh.PresenceOptions) func(*testing.B, *redis.Client) float64 {
	return func(b *testing.B, client *redis.Client) float64 {
		p := startManager(b, usersOptions(client, true), rule)
		ctx := b.Context()
		come := func(name string) func(room, conn string) error {
			return func(_, conn string) error {
				id := name + conn
				if err := p.Connect(ctx, id, metadataOf(conn)); err != nil {
					return err
				}
				if err := p.Join(ctx, "room-"+conn, id); err != nil {
					return err
				}
				return p.Disconnect(ctx, id)
			}
		}
		return throng(b, come("a"), come("b"))
	}
}

func mapThrong(b *testing.B, client *redis.Client) float64 {
	node, broker, err := peer.NewRecoverableMap(client.Options().Addr, entryTTL)
	require.NoError(b, err)
	startNode(b, node)
	ctx := b.Context()
	return throng(b,
		func(room, conn string) error {
			info := &centrifuge.ClientInfo{ClientID: conn, UserID: "user-" + conn}
			_, err := broker.Publish(ctx, room, conn, peer.MapJoin(info))
			return err
		},
		func(room, conn string) error {
			_, err := broker.Remove(ctx, room, conn, centrifuge.MapRemoveOptions{})
			return err
		})
}
