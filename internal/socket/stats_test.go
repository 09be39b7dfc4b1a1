package socket

import "testing"

func TestCountsLookAtEverySocket(t *testing.T) {
	t.Parallel()
	const n = 10 * shards
	var stats Stats
	sockets := make([]*Socket, n)
	for i := range sockets {
		sockets[i] = new(Socket)
		sockets[i].bytes.Store(int64(i))
		stats.enter(sockets[i])
	}
	queued := int64(n * (n - 1) / 2)
	// Remove them in an irregular order, so that each index in a shard is reused.
	for i := n - 1; i >= 0; i -= 3 {
		stats.exit(sockets[i])
		queued -= int64(i)
	}
	if c := stats.Counts(); c.Queued != queued || c.Longest != n-2 {
		t.Errorf("%d queued, %d on one; want %d and %d", c.Queued, c.Longest, queued, n-2)
	}
	for i := range sockets {
		if (n-1-i)%3 != 0 {
			stats.exit(sockets[i])
		}
	}
	if c := stats.Counts(); c.Queued != 0 || c.Longest != 0 {
		t.Errorf("%d queued, %d on one; want none", c.Queued, c.Longest)
	}
}
