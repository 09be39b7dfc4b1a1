package mesh

import (
	"context"
	"encoding/json"
	"fmt"
	"log/slog"
	"net/http"
	"slices"
	"strings"
	"time"
	"unicode"
	"unicode/utf8"

	"github.com/redis/go-redis/v9"

	"github.com/meshpresence/mesh/internal/store"
)

// Options configure a Server or a PresenceManager. Only Redis is required: the
// zero value of every other field means its default. A value out of range is
// an error that names the field and wraps [ErrInvalidOptions]; nothing is
// adjusted silently. Where nothing else is said, durations may be 1 ms to 24 h
// and numbers 1 to 2^30. Options are copied when they are used; changing them
// later has no effect.
type Options struct {
	// Redis is the client to use: a *redis.Client (also one of a Sentinel), or
	// a *redis.ClusterClient that reads from masters only, which means without
	// ReadOnly, RouteByLatency and RouteRandomly. A *redis.Ring is refused, and
	// so is a client-side cache, which may be out of date. The client stays the
	// app's: it is never closed or reconfigured. Required.
	//
	// The client must give up a silent connection soon. DialTimeout,
	// DialerRetryTimeout, ReadTimeout and WriteTimeout must be positive and at
	// most LeaseTTL/3 or 5 s, whichever is longer. With ContextTimeoutEnabled
	// ReadTimeout and WriteTimeout may have any length. The defaults of go-redis
	// fit.
	Redis redis.UniversalClient
	// Prefix begins every key and channel. All servers that share rooms use
	// the same; others sharing the Redis use another, or another database: one
	// may begin with the other. At most 128 bytes of valid UTF-8 without braces,
	// whitespace, control characters, and words of the layout such as
	// "presence:members:". Defaults to "mesh:".
	Prefix string
	// Buckets is how many hash tags rooms are spread over on a Redis Cluster,
	// 1 to 1024. It must be the same on all servers, and for as long as there is
	// data: Start fails with [ErrIncompatible] otherwise. Of no effect without a
	// cluster. Defaults to 64.
	Buckets int

	// LeaseTTL is how long a server may be out of touch with Redis before the
	// others declare it dead: within LeaseTTL + 1 s of its last sign of life
	// its connections have left. The same on all servers; 1 s to 1 h. Behind a
	// Sentinel, servers learn of a new master one after the other, and those
	// that are late see the others fall silent at the old one: LeaseTTL must be
	// at least twice as long as that may take. Defaults to 10 s.
	LeaseTTL time.Duration
	// PingInterval is how often a connection is pinged, 100 ms or more. Stock
	// clients reconnect if they hear no ping for 30 s, twice. Defaults to 30 s.
	PingInterval time.Duration
	// MaxMissedPongs is how many intervals may pass without any frame from the
	// client after the one in which it should have answered a ping; one more,
	// and the connection is closed. At most 1000; negative: none. Defaults
	// to 1.
	MaxMissedPongs int
	// LatencyInterval is how often a connection's round-trip time is measured
	// and told to it, 100 ms or more. Negative: never. Defaults to 5 s.
	LatencyInterval time.Duration
	// EnablePresenceExpirationEvents says whether an entry ends because its
	// TTL ran out, by this server's clock or by Redis's expired events. If
	// false, such entries stay until the app calls
	// PresenceManager.CleanExpired; disconnects, dead servers and the expiry
	// of states are handled all the same. Defaults to nil: true.
	EnablePresenceExpirationEvents *bool

	// GuardTimeout limits how long the guards of one room may take, together,
	// to decide about one connection; then it is refused. Defaults to 5 s.
	GuardTimeout time.Duration
	// HookTimeout limits each call of Authenticate, ClientMetadata, a rule's
	// JoinGuard, and the functions given to OnConnection and OnDisconnection; and
	// the encoding of a value that a method is given, if that has methods of the
	// app's (MarshalJSON and the like). Command handlers and ConnOptions.Foreign
	// have no limit but the end of their connection. Defaults to 5 s.
	HookTimeout time.Duration
	// HandlerConcurrency is how many of the app's own command handlers run at
	// once for one connection. Defaults to 8.
	HandlerConcurrency int
	// WriteTimeout limits each write to a socket, of one frame or of several
	// small ones that go together (16 KiB at most); then the connection is
	// closed. Defaults to 10 s.
	WriteTimeout time.Duration

	// Authenticate decides about a request before it is upgraded. What it
	// returns becomes the connection's metadata (any value that encodes to
	// JSON; nil: none). With an error the upgrade is refused: with the status
	// and text of a *Refusal (see Refuse), else with a bare 401. Defaults to
	// nil: everyone, without metadata. It must be safe for concurrent use. Up to
	// 1,024 calls run at once, including those that go on after HookTimeout.
	// Further requests are answered with 503 and Retry-After.
	Authenticate func(ctx context.Context, r *http.Request) (metadata any, err error)
	// ClientMetadata decides about metadata that a client wants to set for
	// itself: it returns what to store (any value that encodes to JSON,
	// perhaps proposed as it is), or an error to refuse it, which the client
	// is told. m holds the metadata as they are; proposed is the whole of what
	// they would be, after the merge that the client asked for. It may be
	// called again for the same request if the metadata changed meanwhile.
	// Defaults to nil: clients may not set metadata, since guards trust them.
	// It must be safe for concurrent use.
	ClientMetadata func(ctx context.Context, m Member, proposed json.RawMessage) (any, error)
	// AllowedOrigins are patterns for the Origin that a browser sends, each
	// [scheme://]host[:port]: "https://app.example.com",
	// "https://*.example.com" (every subdomain, not example.com itself),
	// "example.com" (http and https), "localhost:*" (any port), or "*"
	// (everything). Without a port only the scheme's own matches. Once there
	// is a pattern, the server's own host has to be listed too. Requests
	// without an Origin are not from browsers and are accepted. Defaults to
	// none: the Origin must be the host that the request was sent to.
	AllowedOrigins []string

	// Limits bound what clients can use up.
	Limits Limits
	// Logger receives log output. Payloads and credentials are never logged. Its
	// handler may be called on several goroutines at once. If a call panics the
	// line is lost. If a call takes longer than 250 ms, the server goes on without it,
	// and drops lines until it returns. Defaults to nil: nothing is logged.
	Logger *slog.Logger

	// For tests of this package.
	edge  func(*store.Store) edge    // nil: the store itself
	files func() (most int, ok bool) // nil: limit.OpenFiles
}

// Limits bound what clients can use up. Zero means the default, a negative
// value no limit. Past one, the request fails with a code, and nothing is half
// done.
type Limits struct {
	// FrameBytes is the size of a frame from a client; a larger one closes the
	// connection. Defaults to 64 KiB.
	FrameBytes int64
	// RoomNameBytes is the length of a room's name. Defaults to 256.
	RoomNameBytes int
	// StateBytes is the size of a presence state as JSON without insignificant
	// space. Defaults to 8 KiB.
	StateBytes int
	// MetadataBytes is the size of a connection's or room's metadata, counted
	// the same way. Defaults to 16 KiB.
	MetadataBytes int
	// RoomsPerConnection is in how many rooms a connection may be. Defaults to
	// 100.
	RoomsPerConnection int
	// SubscriptionsPerConnection is how many rooms a connection may be
	// subscribed to. Defaults to 100.
	SubscriptionsPerConnection int
	// NewRoomsPerMinute is how many rooms a connection may begin to use in a
	// minute, by joining or subscribing. A room is new if the connection is neither
	// in it nor subscribed to it, and has not joined it or subscribed to it in this
	// minute or the one before. (Of more than 512 such rooms in a minute some may be
	// forgotten, and are new again.) The minute begins with the first new room after
	// the last minute ended. Clients that join more rooms than that right after they
	// have connected need a higher limit. Joins by the app do not count. Defaults to
	// 300.
	NewRoomsPerMinute int
	// CommandsPerSecond is how many commands a connection may send in the long
	// run; twice as many at once. Pongs do not count. A connection that keeps
	// sending ten times as many frames of any kind (messages, pings, pongs,
	// fragments without content) is closed with 1008. So is one that sends more than
	// 10,000 other fragments of messages per second, or 20,000 at once. Defaults to
	// 100; negative: none of these limits. A message with more than 2,000 fragments
	// without content closes the connection in any case. (Fragments are counted only
	// if ServeHTTP has upgraded the connection.)
	CommandsPerSecond int
	// QueueBytes is how much may wait to be written to a socket. Past it,
	// states of one member are merged; if that does not help, the connection
	// is closed with code 1013. Commands that wait for their turn weigh as much
	// at most, each with its whole frame. Defaults to 1 MiB.
	QueueBytes int
	// Connections is how many connections a server holds; more are answered
	// with 503. File descriptors (ulimit -n), less those that Redis and the app
	// need, are a limit, too: Start fails if the number given here is higher.
	// Defaults to 100,000, or to what file descriptors allow if that is less,
	// which Start logs. Negative: only file descriptors limit it.
	Connections int
	// UpgradesPerSecond is how many new connections a server accepts in the
	// long run; more are answered with 503 and Retry-After. Requests that are
	// refused for another reason do not count. Defaults to 1,000.
	UpgradesPerSecond int
	// SnapshotMembers is how many members an answer lists; a larger room is
	// answered with that many and the total. Defaults to 1,000.
	SnapshotMembers int
}

const (
	defaultPrefix  = "mesh:"
	maxPrefixBytes = 128
	defaultBuckets = 64
	maxBuckets     = 1024
	maxMissedPongs = 1000
	maxDuration    = 24 * time.Hour
	maxCount       = 1 << 30
)

// withDefaults returns a copy with every default filled in, or an error that
// names the field and wraps ErrInvalidOptions. Applied to its own result it
// changes nothing: what is negative stays so.
func (o Options) withDefaults() (Options, error) {
	if err := checkRedis(o.Redis); err != nil {
		return Options{}, err
	}
	if o.Prefix == "" {
		o.Prefix = defaultPrefix
	}
	if err := checkPrefix(o.Prefix); err != nil {
		return Options{}, err
	}
	if err := o.fillNumbers(); err != nil {
		return Options{}, err
	}
	if err := checkTimeouts(o.Redis, o.LeaseTTL); err != nil {
		return Options{}, err
	}
	if _, err := compileOrigins(o.AllowedOrigins); err != nil {
		return Options{}, err
	}
	o.AllowedOrigins = slices.Clone(o.AllowedOrigins)
	on := o.EnablePresenceExpirationEvents == nil || *o.EnablePresenceExpirationEvents
	o.EnablePresenceExpirationEvents = &on
	if o.Logger == nil {
		o.Logger = slog.New(slog.DiscardHandler)
	}
	return o, nil
}

// fillNumbers fills in and checks the durations, counts and limits.
func (o *Options) fillNumbers() error {
	for _, d := range []struct {
		field         string
		value         *time.Duration
		def, min, max time.Duration
		off           bool // negative: off
	}{
		{"LeaseTTL", &o.LeaseTTL, 10 * time.Second, time.Second, time.Hour, false},
		{"PingInterval", &o.PingInterval, 30 * time.Second, 100 * time.Millisecond, maxDuration, false},
		{"LatencyInterval", &o.LatencyInterval, 5 * time.Second, 100 * time.Millisecond, maxDuration, true},
		{"GuardTimeout", &o.GuardTimeout, 5 * time.Second, time.Millisecond, maxDuration, false},
		{"HookTimeout", &o.HookTimeout, 5 * time.Second, time.Millisecond, maxDuration, false},
		{"WriteTimeout", &o.WriteTimeout, 10 * time.Second, time.Millisecond, maxDuration, false},
	} {
		if err := fill(d.field, d.value, d.def, d.min, d.max, d.off); err != nil {
			return err
		}
	}
	l := &o.Limits
	for _, n := range []struct {
		field    string
		value    *int
		def, max int
		off      bool
	}{
		{"Buckets", &o.Buckets, defaultBuckets, maxBuckets, false},
		{"MaxMissedPongs", &o.MaxMissedPongs, 1, maxMissedPongs, true},
		{"HandlerConcurrency", &o.HandlerConcurrency, 8, maxCount, false},
		{"Limits.RoomNameBytes", &l.RoomNameBytes, 256, maxCount, true},
		{"Limits.StateBytes", &l.StateBytes, 8 << 10, maxCount, true},
		{"Limits.MetadataBytes", &l.MetadataBytes, 16 << 10, maxCount, true},
		{"Limits.RoomsPerConnection", &l.RoomsPerConnection, 100, maxCount, true},
		{"Limits.SubscriptionsPerConnection", &l.SubscriptionsPerConnection, 100, maxCount, true},
		{"Limits.NewRoomsPerMinute", &l.NewRoomsPerMinute, 300, maxCount, true},
		{"Limits.CommandsPerSecond", &l.CommandsPerSecond, 100, maxCount, true},
		{"Limits.QueueBytes", &l.QueueBytes, 1 << 20, maxCount, true},
		{"Limits.Connections", &l.Connections, defaultConnections, maxCount, true},
		{"Limits.UpgradesPerSecond", &l.UpgradesPerSecond, 1000, maxCount, true},
		{"Limits.SnapshotMembers", &l.SnapshotMembers, 1000, maxCount, true},
	} {
		if err := fill(n.field, n.value, n.def, 1, n.max, n.off); err != nil {
			return err
		}
	}
	return fill("Limits.FrameBytes", &l.FrameBytes, 64<<10, 1, maxCount, true)
}

// fill puts def in place of 0 and checks the range.
func fill[T int | int64 | time.Duration](field string, value *T, def, least, most T, off bool) error {
	switch v := *value; {
	case v == 0:
		*value = def
	case v < 0 && off:
	case v < 0:
		return fmt.Errorf("%w: %s is %v, must not be negative", ErrInvalidOptions, field, v)
	case v < least:
		return fmt.Errorf("%w: %s is %v, must be at least %v", ErrInvalidOptions, field, v, least)
	case v > most:
		return fmt.Errorf("%w: %s is %v, must be at most %v", ErrInvalidOptions, field, v, most)
	}
	return nil
}

// checkPrefix refuses what would confuse hash tags, logs or people.
func checkPrefix(prefix string) error {
	switch {
	case !utf8.ValidString(prefix):
		return fmt.Errorf("%w: Prefix %q is not valid UTF-8", ErrInvalidOptions, prefix)
	case len(prefix) > maxPrefixBytes:
		return fmt.Errorf("%w: Prefix is longer than %d bytes", ErrInvalidOptions, maxPrefixBytes)
	case strings.ContainsAny(prefix, "{}"):
		return fmt.Errorf("%w: Prefix %q holds a brace", ErrInvalidOptions, prefix)
	case strings.ContainsFunc(prefix, func(r rune) bool { return unicode.IsSpace(r) || unicode.IsControl(r) }):
		return fmt.Errorf("%w: Prefix %q holds whitespace or a control character", ErrInvalidOptions, prefix)
	}
	for _, word := range layoutWords {
		if strings.Contains(prefix, word) {
			return fmt.Errorf("%w: Prefix %q holds %q, which keys of the prefix before it have as well", ErrInvalidOptions, prefix, word)
		}
	}
	return nil
}

// clustered reports whether keys need hash tags.
func (o Options) clustered() bool {
	_, ok := o.Redis.(*redis.ClusterClient)
	return ok
}

// buckets is how many buckets there are: Buckets on a cluster, else 1.
func (o Options) buckets() int {
	if o.clustered() {
		return o.Buckets
	}
	return 1
}

// missedPongs is MaxMissedPongs as a number to compare with.
func (o Options) missedPongs() int { return max(o.MaxMissedPongs, 0) }

// expirationEvents is EnablePresenceExpirationEvents as a bool.
func (o Options) expirationEvents() bool {
	return o.EnablePresenceExpirationEvents == nil || *o.EnablePresenceExpirationEvents
}

// over reports whether n is past a limit of Limits.
func over[T int | int64](n, limit T) bool { return limit >= 0 && n > limit }
