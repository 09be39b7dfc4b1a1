package mesh

import (
	"context"
	"encoding/json"
	"fmt"
	"log/slog"
	"net/http"
	"os"
	"slices"
	"time"

	"github.com/redis/go-redis/v9"

	"github.com/meshpresence/mesh/internal/handshake"
	"github.com/meshpresence/mesh/internal/keys"
	"github.com/meshpresence/mesh/internal/origin"
	"github.com/meshpresence/mesh/internal/redisclient"
	"github.com/meshpresence/mesh/internal/store"
	"github.com/meshpresence/mesh/internal/testhook"
)

// Options configure a Server or a PresenceManager. Only Redis is required. The zero
// value of every other field means its default. A value out of range is an error that
// names the field and wraps [ErrInvalidOptions]. No value is adjusted silently. Unless
// a field says otherwise, durations may be 1 ms to 24 h and numbers 1 to 2^30. Options
// are copied when they are used, so that later changes have no effect.
type Options struct {
	// Redis is the client to use: a *redis.Client (also one of a Sentinel), or a
	// *redis.ClusterClient that reads from masters only, that is, without ReadOnly,
	// RouteByLatency and RouteRandomly. A *redis.Ring is rejected. So is a client with
	// a client-side cache, because the cache may be out of date. The client belongs to
	// the app: it is never closed or reconfigured. Required.
	//
	// The client must give up a silent connection soon. DialTimeout,
	// DialerRetryTimeout, ReadTimeout and WriteTimeout must be positive and at most
	// LeaseTTL/3 or 5 s, whichever is longer. With ContextTimeoutEnabled, ReadTimeout
	// and WriteTimeout may have any length. The defaults of go-redis fit.
	Redis redis.UniversalClient
	// Prefix begins every key and channel. All servers of a group use the same prefix.
	// Other groups on the same Redis use another prefix or another database. One prefix
	// may begin with another. At most 128 bytes of valid UTF-8 without braces,
	// whitespace, control characters, and words of the layout such as
	// "presence:members:". Defaults to "mesh:".
	Prefix string
	// Buckets is the number of hash tags over which rooms are spread on a Redis
	// Cluster, 1 to 1024. It must be the same on all servers, and must not change while
	// there is data: otherwise Start fails with [ErrIncompatible]. It has no effect
	// without a cluster. Defaults to 64.
	Buckets int

	// Name says which server this is, for people: at most 128 bytes of valid UTF-8
	// without control characters. It appears in ServerInfo on all servers, in each line
	// of the Logger as the attribute "server", and on the page of meshdebug. Names need
	// not differ. Defaults to the name of the host, or to none if the host has none
	// that fits.
	Name string

	// LeaseTTL is the time for which a server may be out of contact with Redis before
	// other servers declare it dead. Its connections have left at most LeaseTTL + 1 s
	// after it last renewed its lease. It must be the same on all servers, 1 s to 1 h.
	// Behind a Sentinel, servers learn of a new master at different times, and late
	// servers see the others fall silent at the old master. LeaseTTL must be at least
	// twice as long as that takes. Defaults to 10 s.
	LeaseTTL time.Duration
	// PingInterval is the interval between two pings of a connection, at least 100 ms.
	// Stock clients reconnect if they get no ping for 30 s, twice. Defaults to 30 s.
	PingInterval time.Duration
	// MaxMissedPongs is the number of further intervals that may pass without any frame
	// from the client, after the interval in which it should have answered a ping.
	// After one more, the connection is closed. At most 1000. Negative means none.
	// Defaults to 1.
	MaxMissedPongs int
	// LatencyInterval is the interval at which the round-trip time of a connection is
	// measured and sent to it, at least 100 ms. Negative means never. Defaults to 5 s.
	LatencyInterval time.Duration
	// EnablePresenceExpirationEvents controls whether an entry ends because its TTL ran
	// out, by the clock of this server or by an expired event of Redis. If false, such
	// entries stay until the app calls PresenceManager.CleanExpired. Disconnects, dead
	// servers and the expiry of states are still handled. Defaults to nil, which means
	// true.
	EnablePresenceExpirationEvents *bool

	// GuardTimeout limits the time in which all guards of one room together must decide
	// about one connection. After it the connection is refused. Defaults to 5 s.
	GuardTimeout time.Duration
	// HookTimeout limits each call of Authenticate, ClientMetadata, a rule's JoinGuard,
	// and the functions given to OnConnection and OnDisconnection. It also limits the
	// encoding of a value given to a method, if the value has methods of the app
	// (MarshalJSON and the like). Command handlers and ConnOptions.Foreign are limited
	// only by the end of their connection. Defaults to 5 s.
	HookTimeout time.Duration
	// HandlerConcurrency is the number of the app's command handlers that run at once
	// for one connection. More commands wait. Defaults to 8.
	HandlerConcurrency int
	// WriteTimeout limits each write to a socket. A write is one frame or several small
	// ones together (16 KiB at most). After the limit the connection is closed.
	// Defaults to 10 s.
	WriteTimeout time.Duration

	// Authenticate decides about a request before it is upgraded. The returned metadata
	// (any value that encodes to JSON, or nil for none) becomes the metadata of the
	// connection.
	//
	// If it returns an error, the upgrade is refused. A *Refusal chooses the status and
	// text (see Refuse). Other errors are answered with a bare 401, or with a bare 500
	// if they say nothing about the client:
	//
	//   - the error wraps an error of a context, a network, Redis, or a SQL database that does not answer
	//   - the call panics or takes too long
	//   - the metadata does not encode or is too large
	//
	// Wrap other errors that say nothing about the client (of gRPC, for example) with
	// ErrUnavailable. The error is logged without queries of URLs and without values
	// from the request.
	//
	// It must be safe for concurrent use. Up to 1,024 calls run at once, including
	// those that continue after HookTimeout. Further requests are answered with 503 and
	// Retry-After. Defaults to nil: every client is accepted, without metadata.
	Authenticate func(ctx context.Context, r *http.Request) (metadata any, err error)
	// ClientMetadata decides about metadata that a client wants to set for itself. It
	// returns the value to store (any value that encodes to JSON, for example proposed
	// itself), or an error that refuses the change and is sent to the client. m holds
	// the current metadata. proposed is the complete new value after the merge that the
	// client asked for. It may be called again for the same request if the metadata
	// changed during the call. It must be safe for concurrent use. Defaults to nil:
	// clients may not set metadata, because guards trust it.
	ClientMetadata func(ctx context.Context, m Member, proposed json.RawMessage) (any, error)
	// UserID returns the user of a connection, or "" for none. m holds the id and the
	// metadata of the connection. An id is valid UTF-8 of 1 to 128 bytes without control
	// characters and without U+FFFD. Any other id counts as none, is counted in
	// Stats.InvalidUserIDs and logged. [UserIDField] reads a field of the metadata.
	//
	// All servers must use the same function. It is called for each new version of the
	// metadata, so it must be fast, must not block, and must return the same user for the
	// same metadata. It must be safe for concurrent use. It cannot be spoofed by clients
	// if the metadata cannot (see ClientMetadata). Servers without UserID do not end kept
	// places, so before you remove it, deploy with Grace 0 until the old Grace is over.
	// Defaults to nil: there are no users, and nothing is spent on them.
	UserID func(m Member) string
	// AllowedOrigins are patterns for the Origin header that browsers send, each
	// [scheme://]host[:port]: "https://app.example.com", "https://*.example.com" (every
	// subdomain, but not example.com itself), "example.com" (http and https),
	// "localhost:*" (any port), or "*" (everything). A pattern without a port matches
	// only the default port of the scheme. If there is any pattern, the server's own
	// host must be listed too. Requests without an Origin do not come from browsers and
	// are accepted. Defaults to none: the Origin must be the host that the request was
	// sent to.
	AllowedOrigins []string
	// Subprotocols are the WebSocket subprotocols that the server supports, in order of
	// preference. The 101 response names the first one that the client offers. This
	// lets a page pass a token: with new WebSocket(url, ["mesh", token]) and
	// Subprotocols []string{"mesh"}, Authenticate finds both in the request's
	// Sec-WebSocket-Protocol, and the token is never sent back. If there is no common
	// subprotocol, the 101 names none. Clients that offered some may continue, but
	// browsers (except Firefox) close the connection. Names are HTTP tokens, each
	// listed once. Defaults to none.
	Subprotocols []string

	// Limits bound the resources that clients can use.
	Limits Limits
	// Logger receives log output. Payloads and credentials are never logged. Its
	// handler may be called by several goroutines at once. If a call panics, the line
	// is lost. If a call takes longer than 250 ms, the server continues without it, and
	// drops lines until the call returns. Defaults to nil: nothing is logged.
	Logger *slog.Logger

	// The fields below are for tests of this package.
	edge  func(*store.Store) testhook.Seams // nil: the store itself
	files func() (most int, ok bool)        // nil: limit.OpenFiles
	host  func() (string, error)            // nil: os.Hostname
}

// Limits bound the resources that clients can use. Zero means the default, and a
// negative value means no limit. A request beyond a limit fails with a code, and
// nothing is half done.
type Limits struct {
	// FrameBytes is the size of a frame from a client. A larger frame closes the
	// connection. Defaults to 64 KiB.
	FrameBytes int64
	// RoomNameBytes is the length of a room name. Defaults to 256.
	RoomNameBytes int
	// StateBytes is the size of a presence state as JSON without insignificant space.
	// Defaults to 8 KiB.
	StateBytes int
	// MetadataBytes is the size of a connection's or room's metadata, counted
	// the same way. Defaults to 16 KiB.
	MetadataBytes int
	// DisconnectedPerUser is the number of places that rooms keep at once for one user
	// (see PresenceOptions.Grace), counted by each server for its own ended connections.
	// Beyond it the oldest place ends early. Defaults to 100.
	DisconnectedPerUser int
	// RoomsPerConnection is the number of rooms that a connection may be in. Commands
	// of a connection about different rooms run concurrently, in as many rooms as this
	// limit and SubscriptionsPerConnection allow together, 1,024 at most. Defaults to
	// 100.
	RoomsPerConnection int
	// SubscriptionsPerConnection is the number of rooms that a connection may be
	// subscribed to. Defaults to 100.
	SubscriptionsPerConnection int
	// OccupanciesPerConnection is the number of rooms whose numbers a connection may be
	// subscribed to. Defaults to 1,000.
	OccupanciesPerConnection int
	// NewRoomsPerMinute is the number of rooms that a connection may begin to use in a
	// minute, by joining or subscribing. A room is new if the connection is neither in
	// it nor subscribed to it, and has not joined it or subscribed to it in this minute
	// or the one before. (Of more than 512 such rooms in a minute some may be
	// forgotten, and then count as new again.) The minute begins with the first new
	// room after the last minute ended. Clients that join more rooms right after they
	// have connected need a higher limit. Joins by the app do not count. For
	// subscriptions to numbers of rooms, ten times this number is a limit of its own.
	// Defaults to 300.
	NewRoomsPerMinute int
	// CommandsPerSecond is the rate at which commands of a connection are begun in the
	// long run. Bursts of twice as many are allowed. Further commands wait, in the
	// order in which they were sent. Pongs do not count. In a room whose rule has a
	// StateInterval, a state that only replaces a waiting state does not count either.
	//
	// A flood closes the connection with 1008: a client that keeps sending ten times as
	// many frames of any kind (messages, pings, pongs, fragments without content). A
	// command that is one too many is answered with ELIMIT first. Waiting commands are
	// not answered. Frames count when they are read (see QueueBytes). A connection is
	// also closed if it sends more than 10,000 other fragments of messages per second,
	// or 20,000 at once. Defaults to 100. Negative means none of these limits. A
	// message with more than 2,000 fragments without content closes the connection in
	// any case. (Fragments are counted only if ServeHTTP has upgraded the connection.)
	CommandsPerSecond int
	// QueueBytes is the number of bytes that may wait to be written to a socket. Beyond
	// it, states of one member are merged. If that does not help, the connection is
	// closed with code 1013. Answers to commands fill at most half of it, so that no
	// client is closed because of its own requests. While half of it is full, no
	// command is begun, except for a few of the protocol's own if the queue is full of
	// other things than answers.
	//
	// The same limit holds for commands that wait, and for the protocol's own until
	// they are answered. Each counts with its whole frame and 256 bytes more. Beyond
	// the limit nothing is read from the socket until there is room. During that time
	// the client counts as alive, because its pongs may be unread. If none of its
	// commands completes for two minutes, it is closed with 1013. Defaults to 1 MiB.
	QueueBytes int
	// Connections is the number of connections that a server holds. Further requests
	// are answered with 503. File descriptors (ulimit -n), less those that Redis and
	// the app need, are a limit, too: Start fails if the number given here is higher.
	// Defaults to 100,000, or to the number that file descriptors allow if that is
	// less, which Start logs. Negative means that only file descriptors limit it.
	Connections int
	// UpgradesPerSecond is the rate of new connections that a server accepts in the
	// long run. Further requests are answered with 503 and Retry-After. Requests that
	// are refused for another reason do not count. Defaults to 1,000.
	UpgradesPerSecond int
	// SnapshotMembers is the number of members that an answer lists. For a larger room
	// the answer lists that many members and the total. Defaults to 1,000.
	SnapshotMembers int
}

// keptAnswers returns the number of guard answers to keep for a connection. Zero stands for
// the default of package guards.
func (o Options) keptAnswers() int {
	l := o.Limits
	if l.RoomsPerConnection > 0 && l.SubscriptionsPerConnection > 0 && l.OccupanciesPerConnection > 0 {
		return l.RoomsPerConnection + l.SubscriptionsPerConnection + l.OccupanciesPerConnection
	}
	return 0
}

// missedPongs returns MaxMissedPongs with negative values as 0.
func (o Options) missedPongs() int { return max(o.MaxMissedPongs, 0) }

// expirationEvents returns EnablePresenceExpirationEvents with its default.
func (o Options) expirationEvents() bool {
	return o.EnablePresenceExpirationEvents == nil || *o.EnablePresenceExpirationEvents
}

// over reports whether n exceeds a limit of Limits.
func over[T int | int64](n, limit T) bool { return limit >= 0 && n > limit }

const (
	maxBuckets     = 1024
	maxMissedPongs = 1000
	maxDuration    = 24 * time.Hour

	defaultConnections = 100_000
	maxCount           = 1 << 30
)

// withDefaults returns a copy with every default filled in, or an error that names the
// field and wraps ErrInvalidOptions. Applied to its own result it changes nothing:
// negative values stay negative.
func (o Options) withDefaults() (Options, error) {
	if err := redisclient.Check(o.Redis); err != nil {
		return Options{}, fmt.Errorf("%w: Redis %w", ErrInvalidOptions, err)
	}
	if o.Prefix == "" {
		o.Prefix = keys.DefaultPrefix
	}
	if err := keys.ValidatePrefix(o.Prefix); err != nil {
		return Options{}, err
	}
	if err := o.fillName(); err != nil {
		return Options{}, err
	}
	if err := o.fillNumbers(); err != nil {
		return Options{}, err
	}
	if err := redisclient.CheckTimeouts(o.Redis, o.LeaseTTL); err != nil {
		return Options{}, fmt.Errorf("%w: Redis %w", ErrInvalidOptions, err)
	}
	if _, err := origin.Compile(o.AllowedOrigins); err != nil {
		return Options{}, err
	}
	if err := handshake.CheckSubprotocols(o.Subprotocols); err != nil {
		return Options{}, err
	}
	o.AllowedOrigins, o.Subprotocols = slices.Clone(o.AllowedOrigins), slices.Clone(o.Subprotocols)
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
		{"Buckets", &o.Buckets, keys.DefaultBuckets, maxBuckets, false},
		{"MaxMissedPongs", &o.MaxMissedPongs, 1, maxMissedPongs, true},
		{"HandlerConcurrency", &o.HandlerConcurrency, 8, maxCount, false},
		{"Limits.RoomNameBytes", &l.RoomNameBytes, 256, maxCount, true},
		{"Limits.StateBytes", &l.StateBytes, 8 << 10, maxCount, true},
		{"Limits.MetadataBytes", &l.MetadataBytes, 16 << 10, maxCount, true},
		{"Limits.RoomsPerConnection", &l.RoomsPerConnection, 100, maxCount, true},
		{"Limits.DisconnectedPerUser", &l.DisconnectedPerUser, 100, maxCount, true},
		{"Limits.SubscriptionsPerConnection", &l.SubscriptionsPerConnection, 100, maxCount, true},
		{"Limits.OccupanciesPerConnection", &l.OccupanciesPerConnection, 1000, maxCount, true},
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

// fill replaces 0 by def and checks the range.
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

// fillName sets a missing name to the name of the host, and checks a given one.
func (o *Options) fillName() error {
	if o.Name != "" {
		return keys.ValidateServerName(o.Name)
	}
	host := o.host
	if host == nil {
		host = os.Hostname
	}
	if name, err := host(); err == nil && keys.ValidateServerName(name) == nil {
		o.Name = name
	}
	return nil
}
