package mesh

import (
	"fmt"
	"log/slog"
	"os"
	"slices"
	"time"

	"github.com/meshpresence/mesh/internal/handshake"
	"github.com/meshpresence/mesh/internal/keys"
	"github.com/meshpresence/mesh/internal/origin"
	"github.com/meshpresence/mesh/internal/redisclient"
)

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
