package main

import (
	"errors"
	"fmt"
	"net/url"
	"strings"
	"time"

	"github.com/redis/go-redis/v9"
)

// cutOff is the time that a drain may take longer than its spread. Sockets that do not
// answer their close frame are cut off after two seconds, and hooks may still run.
const cutOff = 5 * time.Second

// settings holds the settings from the environment.
type settings struct {
	// redis connects to REDIS_URL: redis://user:password@host:6379/0, or rediss:// for
	// TLS. For a cluster, give further nodes: redis://host:6379?addr=host2:6379.
	// Required.
	redis func() redis.UniversalClient
	// listen is LISTEN_ADDR. Defaults to ":8080".
	listen string
	// origins are ALLOWED_ORIGINS, separated by commas. Defaults to none, which allows
	// only the host that the request was sent to.
	origins []string
	// spread is DRAIN_SPREAD, the time over which all sockets are closed. Defaults to
	// 20s.
	spread time.Duration
	// shutdown is SHUTDOWN_TIMEOUT, the time limit for the rest of the shutdown. Defaults
	// to 10s.
	shutdown time.Duration
}

func settingsFrom(getenv func(string) string) (settings, error) {
	s := settings{listen: ":8080"}
	if addr := getenv("LISTEN_ADDR"); addr != "" {
		s.listen = addr
	}
	for origin := range strings.SplitSeq(getenv("ALLOWED_ORIGINS"), ",") {
		if origin = strings.TrimSpace(origin); origin != "" {
			s.origins = append(s.origins, origin)
		}
	}
	var errs [3]error
	s.redis, errs[0] = redisFrom(getenv("REDIS_URL"))
	s.spread, errs[1] = durationFrom(getenv, "DRAIN_SPREAD", 20*time.Second)
	s.shutdown, errs[2] = durationFrom(getenv, "SHUTDOWN_TIMEOUT", 10*time.Second)
	return s, errors.Join(errs[:]...)
}

// stopTime is the longest time from SIGTERM to the end of the program.
func (s settings) stopTime() time.Duration { return s.spread + cutOff + s.shutdown }

func durationFrom(getenv func(string) string, name string, otherwise time.Duration) (time.Duration, error) {
	text := getenv(name)
	if text == "" {
		return otherwise, nil
	}
	d, err := time.ParseDuration(text)
	if err == nil && d <= 0 {
		err = errors.New("must be positive")
	}
	if err != nil {
		return 0, fmt.Errorf("%s %q: %w", name, text, err)
	}
	return d, nil
}

// redisFrom returns a function that connects to a URL. Its errors do not contain the URL,
// which may hold a password.
func redisFrom(text string) (func() redis.UniversalClient, error) {
	if text == "" {
		return nil, errors.New("REDIS_URL is required, such as redis://localhost:6379")
	}
	u, err := url.Parse(text)
	if err != nil {
		return nil, errors.New("REDIS_URL is not a URL")
	}
	if u.Query().Has("addr") {
		opts, err := redis.ParseClusterURL(text)
		if err != nil {
			return nil, fmt.Errorf("REDIS_URL: %w", err)
		}
		return func() redis.UniversalClient { return redis.NewClusterClient(opts) }, nil
	}
	opts, err := redis.ParseURL(text)
	if err != nil {
		return nil, fmt.Errorf("REDIS_URL: %w", err)
	}
	return func() redis.UniversalClient { return redis.NewClient(opts) }, nil
}
