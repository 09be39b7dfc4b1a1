// Package keys builds the names of all keys and channels in Redis, reads back those of
// expired keys, and checks the names that users choose: prefixes, rooms and connection
// ids.
package keys

import (
	"fmt"
	"hash/fnv"
	"math/rand/v2"
	"strconv"
)

// The defaults of Options.
const (
	DefaultPrefix  = "mesh:"
	DefaultBuckets = 64
)

// Space builds the names of one group of servers. It implements store.Keys.
//
// After the prefix comes a fixed word, and the parts that vary come last. So no name can
// be read as another one, whatever bytes the name of a room contains. A name with a room
// and a connection is split at its last colon, because connection ids contain none.
//
// On a cluster the bucket follows the prefix as a hash tag. It has the first brace of the
// name, so that a brace in the name of a room does not change the slot.
//
// The names, and the spreading of rooms over buckets, are part of the layout. A change
// needs a new format version.
type Space struct {
	Prefix  string // with its colon, without braces
	DB      int    // number of the database; in the names of channels, which all databases share
	Spread  int    // number of buckets; 1 without a cluster
	Cluster bool
}

// Buckets implements store.Keys.
func (k Space) Buckets() int { return max(k.Spread, 1) }

// Clustered implements store.Keys.
func (k Space) Clustered() bool { return k.Cluster }

// RoomBucket implements store.Keys.
func (k Space) RoomBucket(room string) int { return k.bucket(room) }

// ConnBucket implements store.Keys.
func (k Space) ConnBucket(conn string) int { return k.bucket(conn) }

// bucket spreads names over the buckets. The low bits of FNV-1a depend only on the low
// bits of the name's bytes, so the finalizer of MurmurHash3 mixes all bits.
func (k Space) bucket(name string) int {
	if k.Buckets() == 1 {
		return 0
	}
	f := fnv.New32a()
	_, _ = f.Write([]byte(name)) // never fails
	h := f.Sum32()
	h = (h ^ h>>16) * 0x85ebca6b
	h = (h ^ h>>13) * 0xc2b2ae35
	h ^= h >> 16
	return int(h % uint32(k.Buckets()))
}

// in returns the prefix of the names in a bucket.
func (k Space) in(bucket int) string {
	if !k.Cluster {
		return k.Prefix
	}
	return k.Prefix + "{" + strconv.Itoa(bucket) + "}:"
}

// Members implements store.Keys.
func (k Space) Members(room string) string {
	return k.in(k.bucket(room)) + "presence:members:" + room
}

// Conn implements store.Keys.
func (k Space) Conn(room, conn string) string {
	return k.in(k.bucket(room)) + "presence:conn:" + room + ":" + conn
}

// State implements store.Keys.
func (k Space) State(room, conn string) string {
	return k.in(k.bucket(room)) + "presence:state:" + room + ":" + conn
}

// Seq implements store.Keys.
func (k Space) Seq(room string) string { return k.in(k.bucket(room)) + "presence:seq:" + room }

// Users implements store.Keys.
func (k Space) Users(room string) string { return k.in(k.bucket(room)) + "presence:users:" + room }

// Recount implements store.Keys.
func (k Space) Recount(room string) string {
	return k.in(k.bucket(room)) + "presence:recount:" + room
}

// RoomMeta implements store.Keys.
func (k Space) RoomMeta(room string) string { return k.in(k.bucket(room)) + "room-meta:" + room }

// ConnMeta implements store.Keys.
func (k Space) ConnMeta(conn string) string {
	return k.in(k.bucket(conn)) + "connection-meta:" + conn
}

// Owned implements store.Keys.
func (k Space) Owned(bucket int, incarnation string) string {
	return k.in(bucket) + "presence:owned:" + incarnation
}

// Fence implements store.Keys.
func (k Space) Fence(bucket int, incarnation string) string {
	return k.in(bucket) + "fence:" + incarnation
}

// Rooms implements store.Keys.
func (k Space) Rooms(bucket int) string { return k.in(bucket) + "presence:rooms" }

// Kept implements store.Keys.
func (k Space) Kept(bucket int) string { return k.in(bucket) + "presence:kept" }

// Instances implements store.Keys. It is in bucket 0, as Dead, Name and Format are.
func (k Space) Instances() string { return k.in(0) + "instances" }

// Dead implements store.Keys.
func (k Space) Dead() string { return k.in(0) + "dead" }

// Name implements store.Keys.
func (k Space) Name(incarnation string) string { return k.in(0) + "server-name:" + incarnation }

// Format implements store.Keys.
func (k Space) Format() string { return k.in(0) + "format" }

// OtherFormat implements store.Keys. It returns the name that Format has on a cluster if
// this is none, and the reverse.
func (k Space) OtherFormat() string {
	k.Cluster = !k.Cluster
	return k.Format()
}

// Canary implements store.Keys. Each call returns a new name. On a cluster it may be in
// any slot.
func (k Space) Canary() string {
	return fmt.Sprintf("%scanary:%016x", k.Prefix, rand.Uint64())
}

// OtherServerKeys implements store.Keys. It returns names of the TypeScript server. They
// exist while it runs, and mostly for longer.
func (k Space) OtherServerKeys() []string {
	names := []string{k.Prefix + "connections", k.Prefix + "connection-meta"}
	if k.Cluster { // without a cluster, Instances has this name
		names = append(names, k.Prefix+"instances")
	}
	return names
}

// EventsPrefix implements store.Keys.
func (k Space) EventsPrefix() string { return k.channels() + "presence:events:" }

// ServerChannel implements store.Keys.
func (k Space) ServerChannel(incarnation string) string {
	return k.channels() + "server:" + incarnation
}

// EndedChannel returns the channel on which servers tell each other which expired entries
// and states they have ended: see package expired.
func (k Space) EndedChannel() string { return k.channels() + "ended" }

// channels returns the prefix of channels. The sign before the number separates the two,
// if the prefix ends in a digit: "app1" in database 0 and "app" in database 10 differ.
func (k Space) channels() string { return k.Prefix + "@" + strconv.Itoa(k.DB) + ":" }
