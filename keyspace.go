package mesh

import (
	"context"
	"fmt"
	"hash/fnv"
	"log/slog"
	"math/rand/v2"
	"strconv"
	"strings"
	"time"
	"unicode"
	"unicode/utf8"

	"github.com/meshpresence/mesh/internal/store"
	"github.com/meshpresence/mesh/internal/wire"
	"github.com/redis/go-redis/v9"
)

const (
	// maxConnectionID is how many bytes a connection id may have.
	maxConnectionID = 128
	// expirySettleTime is how long the start waits to learn whether expired
	// events arrive.
	expirySettleTime = 3 * time.Second
)

// keyspace names everything that mesh keeps in Redis. Names differ by a word
// after the prefix, and what varies stands last, so that no name can be read
// as another, whatever bytes a room's name holds: where a room and a
// connection follow each other, the last colon parts them, because connection
// ids hold none.
//
// On a cluster the bucket follows the prefix as a hash tag: the first brace of
// every name is ours, so a brace in a room's name has no say in the slot.
//
// How names are built and rooms are spread is part of the layout: a change
// needs a new format version.
type keyspace struct {
	prefix  string // with its colon, no braces in it
	db      int    // channels are shared by all databases, so they carry its number
	buckets int    // 1 without a cluster
	cluster bool
}

var _ store.Keys = keyspace{}

// Buckets implements store.Keys.
func (k keyspace) Buckets() int { return max(k.buckets, 1) }

// RoomBucket implements store.Keys.
func (k keyspace) RoomBucket(room string) int { return k.bucket(room) }

// ConnBucket implements store.Keys.
func (k keyspace) ConnBucket(conn string) int { return k.bucket(conn) }

// bucket spreads names: FNV-1a, whose low bits depend on the low bits of the
// name's bytes only, and the finalizer of MurmurHash3, which mixes them all.
func (k keyspace) bucket(name string) int {
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

// in returns the prefix of names that live in a bucket.
func (k keyspace) in(bucket int) string {
	if !k.cluster {
		return k.prefix
	}
	return k.prefix + "{" + strconv.Itoa(bucket) + "}:"
}

// Members implements store.Keys.
func (k keyspace) Members(room string) string {
	return k.in(k.bucket(room)) + "presence:members:" + room
}

// Conn implements store.Keys.
func (k keyspace) Conn(room, conn string) string {
	return k.in(k.bucket(room)) + "presence:conn:" + room + ":" + conn
}

// State implements store.Keys.
func (k keyspace) State(room, conn string) string {
	return k.in(k.bucket(room)) + "presence:state:" + room + ":" + conn
}

// Seq implements store.Keys.
func (k keyspace) Seq(room string) string { return k.in(k.bucket(room)) + "presence:seq:" + room }

// RoomMeta implements store.Keys.
func (k keyspace) RoomMeta(room string) string { return k.in(k.bucket(room)) + "room-meta:" + room }

// ConnMeta implements store.Keys.
func (k keyspace) ConnMeta(conn string) string {
	return k.in(k.bucket(conn)) + "connection-meta:" + conn
}

// Owned implements store.Keys.
func (k keyspace) Owned(bucket int, incarnation string) string {
	return k.in(bucket) + "presence:owned:" + incarnation
}

// Fence implements store.Keys.
func (k keyspace) Fence(bucket int, incarnation string) string {
	return k.in(bucket) + "fence:" + incarnation
}

// Rooms implements store.Keys.
func (k keyspace) Rooms(bucket int) string { return k.in(bucket) + "presence:rooms" }

// Instances implements store.Keys. It shares bucket 0 with Dead and Format.
func (k keyspace) Instances() string { return k.in(0) + "instances" }

// Dead implements store.Keys.
func (k keyspace) Dead() string { return k.in(0) + "dead" }

// Format implements store.Keys.
func (k keyspace) Format() string { return k.in(0) + "format" }

// Canary implements store.Keys. Each call mints a new name, which on a cluster
// may fall into any slot.
func (k keyspace) Canary() string {
	return fmt.Sprintf("%scanary:%016x", k.prefix, rand.Uint64())
}

// Foreign implements store.Keys: names of the TypeScript server, which stand
// for as long as it runs, and mostly for longer.
func (k keyspace) Foreign() []string {
	names := []string{k.prefix + "connections", k.prefix + "connection-meta"}
	if k.cluster { // elsewhere that is the name of one of ours
		names = append(names, k.prefix+"instances")
	}
	return names
}

// EventsPrefix implements store.Keys.
func (k keyspace) EventsPrefix() string { return k.channels() + "presence:events:" }

// Control implements store.Keys.
func (k keyspace) Control(incarnation string) string { return k.channels() + "server:" + incarnation }

// Ended is the channel on which servers say what they have ended because it
// had run out: see hints.
func (k keyspace) Ended() string { return k.channels() + "ended" }

// channels returns the prefix of channels. The sign before the number keeps a
// prefix that ends in a digit apart from a shorter one with a longer number:
// "app1" in database 0 from "app" in database 10.
func (k keyspace) channels() string { return k.prefix + "@" + strconv.Itoa(k.db) + ":" }

// layoutWords stand before what users choose, in the names of keys and
// channels. A prefix may hold none of them: what has the prefix "a:room-meta:"
// would share names with what has the prefix "a:".
var layoutWords = []string{
	"presence:members:", "presence:conn:", "presence:state:", "presence:seq:", "presence:events:", "room-meta:", "connection-meta:",
}

// expiryKind says what the key was that expired.
type expiryKind byte

// The kinds of keys whose expiry means something.
const (
	expiredConn  expiryKind = 'c' // Conn: an entry ran out
	expiredState expiryKind = 's' // State: a state ran out
)

// parseExpired is the inverse of Conn and State. All other keys, those of
// other prefixes and buckets among them, are not ok.
func (k keyspace) parseExpired(key string) (kind expiryKind, room, conn string, ok bool) {
	rest, ok := strings.CutPrefix(key, k.prefix)
	if !ok {
		return 0, "", "", false
	}
	if k.cluster {
		if _, rest, ok = strings.Cut(rest, "}:"); !ok {
			return 0, "", "", false
		}
	}
	if rest, ok = strings.CutPrefix(rest, "presence:"); !ok {
		return 0, "", "", false
	}
	word, rest, _ := strings.Cut(rest, ":")
	build := k.Conn
	switch word {
	case "conn":
		kind = expiredConn
	case "state":
		kind, build = expiredState, k.State
	default:
		return 0, "", "", false
	}
	i := strings.LastIndexByte(rest, ':')
	if i < 0 {
		return 0, "", "", false
	}
	room, conn = rest[:i], rest[i+1:]
	// Building it again also checks the tag: what has another is not ours.
	if !validConnectionID(conn) || build(room, conn) != key {
		return 0, "", "", false
	}
	return kind, room, conn, true
}

// validateConnectionID returns an error that wraps ErrInvalidConnectionID
// unless id is 1 to 128 bytes of UTF-8 without colons, white space and control
// characters.
func validateConnectionID(id string) error {
	if validConnectionID(id) {
		return nil
	}
	return fmt.Errorf("%w: %s must be 1 to %d bytes of UTF-8 without colons, white space or control characters",
		ErrInvalidConnectionID, wire.Quote(id), maxConnectionID)
}

func validConnectionID(id string) bool {
	return id != "" && len(id) <= maxConnectionID && utf8.ValidString(id) &&
		!strings.ContainsFunc(id, func(r rune) bool {
			return r == ':' || unicode.IsSpace(r) || unicode.IsControl(r)
		})
}

// validateRoomName returns an error that wraps ErrInvalidRoom unless name is
// 1 to maxBytes bytes of UTF-8 without control characters. A maxBytes of zero
// or less is no limit.
func validateRoomName(name string, maxBytes int) error {
	switch {
	case name == "":
		return fmt.Errorf("%w: it is empty", ErrInvalidRoom)
	case maxBytes > 0 && len(name) > maxBytes:
		return fmt.Errorf("%w: %s has %d bytes, more than %d", ErrInvalidRoom, wire.Quote(name), len(name), maxBytes)
	case !utf8.ValidString(name):
		return fmt.Errorf("%w: %s is not UTF-8", ErrInvalidRoom, wire.Quote(name))
	case strings.ContainsFunc(name, unicode.IsControl):
		return fmt.Errorf("%w: %s holds a control character", ErrInvalidRoom, wire.Quote(name))
	}
	return nil
}

// expiryConfig configures an expiryListener.
type expiryConfig struct {
	Client redis.UniversalClient
	Keys   keyspace
	// Hint is told what may have expired. It must not block; on a cluster it
	// is called from one goroutine per node.
	Hint func(kind expiryKind, room, conn string)
	// Failover is told that a master of the cluster may have been away, or
	// may be another one; called from several goroutines, it must not block.
	Failover func()
	Logger   *slog.Logger
}

// expiryListener turns Redis's expired events into hints. Every server hears
// each of them, late, twice, or not at all: a hint makes things faster, and
// nothing that is correct rests on it.
type expiryListener struct {
	cfg    expiryConfig
	events *store.ExpiredEvents
	silent bool // the last thing logged: events do not arrive. Only told touches it.
}

func newExpiryListener(cfg expiryConfig) *expiryListener {
	if cfg.Logger == nil {
		cfg.Logger = slog.New(slog.DiscardHandler)
	}
	l := &expiryListener{cfg: cfg}
	l.events = store.NewExpiredEvents(store.ExpiredConfig{
		Client: cfg.Client, DB: cfg.Keys.db, Canary: cfg.Keys.Canary,
		Expired: l.expired, Changed: l.told, Failover: cfg.Failover, Logger: cfg.Logger,
	})
	return l
}

// Start begins listening. It returns as soon as it is known whether events
// arrive, after 3 s, or when ctx ends; listening goes on until Stop.
func (l *expiryListener) Start(ctx context.Context) {
	l.events.Start()
	t := time.NewTimer(expirySettleTime)
	defer t.Stop()
	select {
	case <-l.events.Settled():
	case <-t.C:
	case <-ctx.Done():
	}
}

// Look has Failover told of every failover that there was until now.
func (l *expiryListener) Look(ctx context.Context) error { return l.events.Look(ctx) }

// Stop ends listening and waits until no hint can come any more.
func (l *expiryListener) Stop() { l.events.Stop() }

// Recreate is told that the client leads to another Redis than before: there,
// expired events have to be asked for, and listened to, anew.
func (l *expiryListener) Recreate() { l.events.Recreate() }

// Working reports whether expired events were seen to arrive, at the last look.
func (l *expiryListener) Working() bool { return l.events.State() == store.ExpiredWorks }

func (l *expiryListener) expired(key string) {
	if kind, room, conn, ok := l.cfg.Keys.parseExpired(key); ok {
		l.cfg.Hint(kind, room, conn)
	}
}

// told logs when events fall silent and when they come back, once each. That
// Redis is away says nothing about them, and is logged elsewhere. None of it is
// held back: it takes two probes of two seconds to find that they fell silent,
// and the last line has to be the one that is true.
func (l *expiryListener) told(state store.ExpiredState, err error) {
	switch {
	case state == store.ExpiredSilent && !l.silent:
		l.silent = true
		channel := store.ExpiredChannel(l.cfg.Keys.db)
		l.cfg.Logger.Warn("mesh: Redis sends no expired events; presence that runs out is still told, "+
			"by its owner's clock and by the leases of servers, but may take longer after a crash",
			"remedy", "set notify-keyspace-events to include Ex, in redis.conf or in the parameter group of a managed Redis, "+
				"and let the ACL user subscribe to "+channel+"; or set EnablePresenceExpirationEvents to false",
			"error", err)
	case state == store.ExpiredWorks && l.silent:
		l.silent = false
		l.cfg.Logger.Info("mesh: Redis sends expired events again")
	}
}
