package bench

import (
	"context"
	"encoding/json"
	"fmt"
	"maps"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/centrifugal/centrifuge"
	"github.com/redis/go-redis/v9"
	"github.com/stretchr/testify/require"

	"github.com/meshpresence/mesh"
	"github.com/meshpresence/mesh/bench/internal/peer"
	"github.com/meshpresence/mesh/internal/redistest"
)

const (
	// entries is the number of connections of BenchmarkEntryMemory, each in one room.
	entries = 10_000
	// entryTTL is so long that nothing expires during the measurement.
	entryTTL = 10 * time.Minute
)

// entryID returns a connection id as long as those of the library's sockets.
func entryID(i int) string { return fmt.Sprintf("C%025d", i) }

func entryUser(i int) string { return fmt.Sprintf("user-%05d", i) }

// entryMetadata returns metadata of 95 bytes.
func entryMetadata(i int) json.RawMessage {
	return fmt.Appendf(nil, `{"userId":%q,"name":"Ada Lovelace","avatar":"https://example.com/a/%012d.png"}`, entryUser(i), i)
}

// entryStores are the ways to keep 10,000 connections with metadata in rooms. Each stores
// one connection.
var entryStores = []struct {
	kind  peer.Kind
	start func(b *testing.B, client *redis.Client) func(room string, i int) error
}{
	{"mesh", meshEntries(mesh.PresenceOptions{}, false)},
	{"mesh-ttl", meshEntries(mesh.PresenceOptions{TTL: entryTTL}, false)},
	{"mesh-user", meshEntries(mesh.PresenceOptions{Grace: time.Minute}, true)},
	{"mesh-user-ttl", meshEntries(mesh.PresenceOptions{Grace: time.Minute, TTL: entryTTL}, true)},
	{"mesh-user-packed", packed(meshEntries(mesh.PresenceOptions{Grace: time.Minute}, true))},
	{"mesh-connected", connectedOnly},
	{"centrifuge", classicEntries},
	{"centrifuge-map", mapEntries},
}

// BenchmarkEntryMemory measures the memory that Redis uses for a connection with metadata
// of 95 bytes in one room, all keys included: through the library without and with a
// user, with Centrifuge's presence manager, and with its map broker in recoverable mode.
func BenchmarkEntryMemory(b *testing.B) {
	for _, perRoom := range []int{perRoom, entries} {
		b.Run(fmt.Sprintf("members=%d", perRoom), func(b *testing.B) {
			used := figures{}
			for b.Loop() {
				for _, s := range entryStores {
					client := redistest.Start(b).Client(b)
					add := s.start(b, client)
					require.NoError(b, add("warm-up", entries)) // loads scripts, and makes tables of one entry
					before := usedMemory(b, client)
					var adding sync.WaitGroup
					for w := range 50 {
						adding.Go(func() {
							for i := w; i < entries; i += 50 {
								if err := add(fmt.Sprintf("room-%d", i/perRoom), i); err != nil {
									b.Error(err)
									return
								}
							}
						})
					}
					adding.Wait()
					used[s.kind] = append(used[s.kind], float64(usedMemory(b, client)-before)/entries)
					b.Logf("%s: bytes for each connection by key: %s", s.kind, memoryByKey(b, client))
				}
			}
			for _, s := range entryStores {
				b.ReportMetric(used.median(s.kind), string(s.kind)+"-B")
			}
		})
	}
}

// usedMemory returns the memory of a Redis without the buffers of its clients.
func usedMemory(b *testing.B, client *redis.Client) int {
	b.Helper()
	text, err := client.Info(b.Context(), "memory").Result()
	require.NoError(b, err)
	used := 0
	for line := range strings.Lines(text) {
		name, value, _ := strings.Cut(strings.TrimSpace(line), ":")
		n, _ := strconv.Atoi(value) // not all values are numbers
		switch name {
		case "used_memory":
			used += n
		case "mem_clients_normal":
			used -= n
		}
	}
	require.Positive(b, used)
	return used
}

var roomNumber = regexp.MustCompile(`(room-\d+|warm-up|:C\d{25}|:[A-Z2-7]{26}$)`)

// memoryByKey returns MEMORY USAGE of all keys for each connection, by the names of the
// keys without rooms and connections. The tables that hold the keys are left out.
func memoryByKey(b *testing.B, client *redis.Client) string {
	b.Helper()
	sum := make(map[string]int64)
	for i := client.Scan(b.Context(), 0, "*", 1000).Iterator(); i.Next(b.Context()); {
		n, err := client.MemoryUsage(b.Context(), i.Val(), 0).Result()
		require.NoError(b, err)
		sum[roomNumber.ReplaceAllString(i.Val(), "*")] += n
	}
	var parts []string
	for _, key := range slices.Sorted(maps.Keys(sum)) {
		if each := float64(sum[key]) / entries; each >= 1 {
			parts = append(parts, fmt.Sprintf("%s %.0f", key, each))
		}
	}
	return strings.Join(parts, ", ")
}

func meshEntries(rule mesh.PresenceOptions, users bool) func(*testing.B, *redis.Client) func(string, int) error {
	return func(b *testing.B, client *redis.Client) func(string, int) error {
		opts := mesh.Options{Redis: client, Limits: mesh.Limits{Connections: -1}}
		if users {
			opts.UserID = mesh.UserIDField("userId")
		}
		p := startManager(b, opts, rule)
		return func(room string, i int) error {
			if err := p.Connect(b.Context(), entryID(i), entryMetadata(i)); err != nil {
				return err
			}
			return p.Join(b.Context(), room, entryID(i))
		}
	}
}

// packed lets Redis keep larger values in its compact encoding of small hashes.
func packed(start func(*testing.B, *redis.Client) func(string, int) error) func(*testing.B, *redis.Client) func(string, int) error {
	return func(b *testing.B, client *redis.Client) func(string, int) error {
		require.NoError(b, client.ConfigSet(b.Context(), "hash-max-listpack-value", "512").Err())
		return start(b, client)
	}
}

// connectedOnly keeps connections that are in no room.
func connectedOnly(b *testing.B, client *redis.Client) func(string, int) error {
	p := startManager(b, mesh.Options{Redis: client, Limits: mesh.Limits{Connections: -1}}, mesh.PresenceOptions{})
	return func(_ string, i int) error {
		err := p.Connect(b.Context(), entryID(i), entryMetadata(i))
		for err == nil && p.Stats().Unwritten > 0 {
			time.Sleep(time.Millisecond)
		}
		return err
	}
}

// startManager starts a manager with one rule for all rooms.
func startManager(b *testing.B, opts mesh.Options, rule mesh.PresenceOptions) *mesh.PresenceManager {
	b.Helper()
	p, err := mesh.NewPresenceManager(opts)
	require.NoError(b, err)
	require.NoError(b, p.TrackPresence(mesh.Regexp(regexp.MustCompile(".*")), rule))
	require.NoError(b, p.Start(b.Context()))
	b.Cleanup(func() { require.NoError(b, p.Shutdown(context.Background())) })
	return p
}

func classicEntries(b *testing.B, client *redis.Client) func(string, int) error {
	node, presence, _, err := peer.NewPresence(client.Options().Addr)
	require.NoError(b, err)
	startNode(b, node)
	return func(room string, i int) error { return presence.AddPresence(room, entryID(i), entryInfo(i)) }
}

func mapEntries(b *testing.B, client *redis.Client) func(string, int) error {
	node, broker, err := peer.NewRecoverableMap(client.Options().Addr, entryTTL)
	require.NoError(b, err)
	startNode(b, node)
	return func(room string, i int) error {
		_, err := broker.Publish(b.Context(), room, entryID(i), peer.MapJoin(entryInfo(i)))
		return err
	}
}

func startNode(b *testing.B, node *centrifuge.Node) {
	b.Helper()
	require.NoError(b, node.Run())
	b.Cleanup(func() { require.NoError(b, node.Shutdown(context.Background())) })
}

func entryInfo(i int) *centrifuge.ClientInfo {
	return &centrifuge.ClientInfo{ClientID: entryID(i), UserID: entryUser(i), ConnInfo: entryMetadata(i)}
}
