package store

import (
	"context"
	"errors"
	"fmt"
	"regexp"
	"slices"
	"strings"

	"github.com/redis/go-redis/v9"
)

// Errors for the reason of a refusal by Redis. Each also is an ErrUnavailable, because
// an operator may remove the cause while servers run.
var (
	// ErrFull means that Redis has no memory left for the request.
	ErrFull = errors.New("store: redis is out of memory")
	// ErrForbidden means that Redis rejects the user: the user name or the password is
	// wrong, or the ACL lacks a command, a key pattern or a channel.
	ErrForbidden = errors.New("store: redis refuses this user")
	// ErrMissing means that Redis does not have a command, for example because it was
	// renamed.
	ErrMissing = errors.New("store: redis lacks a command")
	// ErrMisfit means that this client cannot work with this Redis: the server is of
	// another kind (a cluster, a replica), or has no such database. The message says
	// what to use instead.
	ErrMisfit = errors.New("store: wrong client for this redis")
)

var (
	// inScript matches the text that Redis puts before an error of a command in a
	// script. Redis 7 adds nothing. Redis 6.2 adds, for example, "ERR Error running
	// script (call to f_1f): @user_script:1: @user_script: 1: -OOM …".
	inScript = regexp.MustCompile(`^(?:ERR )?(?:Error running script \(call to \S+\): ?)?(?:@?\w+: ?\d+: ?)*-?`)

	// ownCode matches an error code other than ERR.
	ownCode        = regexp.MustCompile(`^[A-Z]{2,} `)
	missingCommand = regexp.MustCompile(`(?i)^(?:unknown|unsupported) (?:redis )?(?:sub)?command\b|^unknown subcommand or wrong|^this redis command is not allowed from script`)
	// commandName matches the name in an error about a command outside of scripts. In
	// scripts the error has no name.
	commandName = regexp.MustCompile("^[^`'\"]*[`'\"]([^`'\"\\s]+)[`'\"]")

	// clusterCodes lists the codes that only a Redis Cluster uses.
	clusterCodes = []string{"MOVED", "ASK", "CROSSSLOT", "CLUSTERDOWN", "TRYAGAIN"}
	userCodes    = []string{"NOPERM", "NOAUTH", "WRONGPASS", "DENIED"}
	// userTexts are the texts about users that have no code: in scripts before
	// Redis 7.2, and if a password is given and none is set.
	userTexts = []string{"The user executing the script", "ACL failure in script", "AUTH <password> called without", "Client sent AUTH"}
)

// redisText returns the error text of Redis, without the code ERR and without the prefix of
// scripts. ok is false if Redis did not answer.
func redisText(err error) (text string, ok bool) {
	var answer redis.Error
	if !errors.As(err, &answer) || errors.Is(err, redis.Nil) {
		return "", false
	}
	return withoutPrefix(answer.Error()), true
}

func withoutPrefix(text string) string { return strings.TrimSpace(inScript.ReplaceAllString(text, "")) }

// hasCode reports whether the text begins with one of the codes.
func hasCode(text string, codes ...string) bool {
	code, _, _ := strings.Cut(text, " ")
	return slices.Contains(codes, strings.TrimSuffix(code, ":"))
}

func isFull(text string) bool { return hasCode(text, "OOM") }

func isForbidden(text string) bool {
	return hasCode(text, userCodes...) ||
		slices.ContainsFunc(userTexts, func(mark string) bool { return strings.Contains(text, mark) })
}

func isMissing(text string) bool { return missingCommand.MatchString(text) }

// explain wraps an error of Redis with its meaning, if that is known.
func (s *Store) explain(err error) error {
	text, ok := redisText(err)
	if !ok {
		return err
	}
	switch {
	case isFull(text):
		return fmt.Errorf("%w: %w", ErrFull, err)
	case isForbidden(text) || redis.IsPermissionError(err) || redis.IsAuthError(err):
		return fmt.Errorf("%w: %w", ErrForbidden, err)
	case isMissing(text):
		// The text of Redis is left out. It repeats the arguments, and those of AUTH
		// are credentials.
		if m := commandName.FindStringSubmatch(text); m != nil {
			if strings.EqualFold(m[1], "sentinel") {
				return fmt.Errorf("%w: %s", ErrMisfit, useClient)
			}
			return fmt.Errorf("%w: %s", ErrMissing, strings.ToLower(m[1]))
		}
		return fmt.Errorf("%w that a script calls", ErrMissing)
	}
	if remedy := s.misfit(text); remedy != "" {
		return fmt.Errorf("%w: %s: %w", ErrMisfit, remedy, err)
	}
	return err
}

const (
	useCluster = "this is a Redis Cluster, so use redis.NewClusterClient"
	useClient  = "FailoverOptions.SentinelAddrs lead to a Redis that is no Sentinel, so use redis.NewClient, or the addresses of Sentinels"
	useMaster  = "this is a replica, which takes no writes, so use the address of the master, or redis.NewFailoverClient behind Sentinel"
)

// misfit returns the remedy if the error text shows that this client can never work
// with this Redis. It returns "" if the call may work later.
func (s *Store) misfit(text string) string {
	switch c := s.client.(type) {
	case *redis.ClusterClient:
		if low := strings.ToLower(text); strings.Contains(low, "cluster") && strings.Contains(low, "disabled") {
			return "this is no Redis Cluster, so use redis.NewClient"
		}
	case *redis.Client:
		switch {
		case hasCode(text, clusterCodes...), strings.Contains(text, "SELECT is not allowed in cluster mode"):
			return useCluster
		case hasCode(text, "READONLY", "MASTERDOWN") && !followsMaster(c):
			return useMaster
		case strings.Contains(text, "DB index is out of range"), strings.Contains(text, "invalid DB index"):
			return fmt.Sprintf("it has no database %d", c.Options().DB)
		}
	}
	return ""
}

// Confirmed reports whether an error with which Start would fail is final. An error
// about a replica or a cluster may come from a Redis that is being replaced. It is
// final unless INFO contradicts it.
func (s *Store) Confirmed(ctx context.Context, err error) bool {
	text, ok := redisText(err)
	if !ok || !errors.Is(err, ErrMisfit) {
		return true
	}
	var section, field, other string
	switch {
	case hasCode(text, "READONLY", "MASTERDOWN"):
		section, field, other = "replication", "role", "master"
	case hasCode(text, clusterCodes...):
		section, field, other = "server", "redis_mode", "standalone"
	default:
		return true
	}
	info, err := call(ctx, s, func(ctx context.Context) (string, error) { return s.client.Info(ctx, section).Result() })
	if err != nil {
		text, ok := redisText(err)
		return ok && !ownCode.MatchString(text) // the server has no such section
	}
	return infoField(info, field) != other
}

// followsMaster reports whether the client asks Sentinel for the master. Such a client
// may reach a demoted master for a moment. Only such a client has this address.
func followsMaster(c *redis.Client) bool { return c.Options().Addr == "FailoverClient" }

// refusal returns the error for one op that Redis refused with this text.
func refusal(text string) error {
	switch {
	case isFull(withoutPrefix(text)):
		return fmt.Errorf("%w: %w: %s", ErrUnavailable, ErrFull, text)
	case aboutData(text):
		return fmt.Errorf("%w: %w: %s", ErrUnavailable, ErrData, text)
	}
	return fmt.Errorf("%w: %s", ErrUnavailable, text)
}
