package main

import (
	"errors"
	"flag"
	"fmt"
	"io"
	"net"
	"net/url"
	"regexp"
	"time"

	"github.com/redis/go-redis/v9"
)

// errHelp says that -h was given and answered.
var errHelp = flag.ErrHelp

// config holds the values of the flags.
type config struct {
	addr           string
	redis          *redis.Options // nil: a Redis in this process
	track          *regexp.Regexp // the tracked rooms
	ttl            time.Duration  // 0: silence alone ends nothing
	grace          time.Duration  // 0: a reload is a leave and a join
	maxUsers       int            // in a room; 0: no limit
	ping           time.Duration
	lease          time.Duration
	clientMetadata bool // whether clients may set their name
}

// parseFlags returns an error that names the flag. It writes to out only for -h, and then
// returns errHelp.
func parseFlags(args []string, out io.Writer) (config, error) {
	cfg := config{track: regexp.MustCompile(`^.+$`)}
	fs := flag.NewFlagSet("whoshere", flag.ContinueOnError)
	fs.SetOutput(io.Discard)
	fs.StringVar(&cfg.addr, "addr", "127.0.0.1:8080", "`host:port` to listen on")
	redisURL := fs.String("redis", "", "`URL` of a Redis, as redis://host:6379/0 (default: one in this process)")
	fs.Func("track", "`regexp` of the rooms with presence (default ^.+$)", cfg.setTrack)
	fs.DurationVar(&cfg.ttl, "ttl", 0, "silent people leave after this `duration`; 0: never")
	fs.DurationVar(&cfg.grace, "grace", 15*time.Second, "people who reload or lose the network keep their place for this `duration`; 0: they do not")
	fs.IntVar(&cfg.maxUsers, "max-users", 0, "`number` of people in a room; 0: no limit")
	fs.DurationVar(&cfg.ping, "ping", 30*time.Second, "`duration` between two pings")
	fs.DurationVar(&cfg.lease, "lease", 10*time.Second, "people of a dead server leave after this `duration`")
	fs.BoolVar(&cfg.clientMetadata, "client-metadata", true, "let people choose their name and colour")
	err := fs.Parse(args)
	if errors.Is(err, flag.ErrHelp) {
		fmt.Fprintln(out, "usage: whoshere [flags]")
		fs.SetOutput(out)
		fs.PrintDefaults()
		return config{}, errHelp
	}
	if err == nil && fs.NArg() > 0 {
		err = fmt.Errorf("unexpected argument %q", fs.Arg(0))
	}
	if err == nil {
		err = cfg.validate()
	}
	if err == nil && *redisURL != "" {
		cfg.redis, err = parseRedisURL(*redisURL)
	}
	return cfg, err
}

// parseRedisURL returns errors without the URL, which may hold a password. Errors of
// package flag would contain it.
func parseRedisURL(s string) (*redis.Options, error) {
	opts, err := redis.ParseURL(s)
	if err == nil {
		return opts, nil
	}
	if urlErr, ok := errors.AsType[*url.Error](err); ok {
		err = urlErr.Err
	}
	return nil, fmt.Errorf("invalid value for flag -redis: %w", err)
}

func (c *config) setTrack(s string) error {
	re, err := regexp.Compile(s)
	c.track = re
	return err
}

// validate checks values that the flags' own parsers accept.
func (c *config) validate() error {
	if _, _, err := net.SplitHostPort(c.addr); err != nil {
		return fmt.Errorf("invalid value %q for flag -addr: want host:port", c.addr)
	}
	if c.ttl != 0 && c.ttl < time.Second {
		return fmt.Errorf("invalid value %v for flag -ttl: want 0, or 1s or more", c.ttl)
	}
	if c.grace != 0 && (c.grace < time.Second || c.grace > 10*time.Minute) {
		return fmt.Errorf("invalid value %v for flag -grace: want 0, or 1s to 10m", c.grace)
	}
	if c.maxUsers < 0 {
		return fmt.Errorf("invalid value %d for flag -max-users: want 0 or more", c.maxUsers)
	}
	if c.ping <= 0 {
		return fmt.Errorf("invalid value %v for flag -ping: want more than 0", c.ping)
	}
	if c.lease <= 0 {
		return fmt.Errorf("invalid value %v for flag -lease: want more than 0", c.lease)
	}
	return nil
}
