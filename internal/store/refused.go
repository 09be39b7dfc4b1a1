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

// Errors that say why Redis refused. Each is an ErrUnavailable, too: an operator
// may remove the cause while servers run.
var (
	// ErrFull says that Redis has no memory left for the request.
	ErrFull = errors.New("store: redis is out of memory")
	// ErrForbidden says that Redis rejects the user: the user or the password is
	// wrong, or the ACL lacks a command, a key pattern or a channel.
	ErrForbidden = errors.New("store: redis refuses this user")
	// ErrMissing says that Redis does not have a command, for instance because
	// it was renamed.
	ErrMissing = errors.New("store: redis lacks a command")
	// ErrMisfit says that this client cannot work with this Redis: it is of
	// another kind (a Cluster, a replica), or has no such database. The message
	// says what to use instead.
	ErrMisfit = errors.New("store: wrong client for this redis")
)

var (
	// inScript matches what Redis, before an error's own text, says about the
	// script that met it. Redis 7 says nothing. Redis 6.2 says, for instance,
	// "ERR Error running script (call to f_1f): @user_script:1: @user_script: 1: -OOM …".
	inScript = regexp.MustCompile(`^(?:ERR )?(?:Error running script \(call to \S+\): ?)?(?:@?\w+: ?\d+: ?)*-?`)

	// ownCode matches the code of an error that is not just ERR.
	ownCode        = regexp.MustCompile(`^[A-Z]{2,} `)
	missingCommand = regexp.MustCompile(`(?i)^(?:unknown|unsupported) (?:redis )?(?:sub)?command\b|^unknown subcommand or wrong|^this redis command is not allowed from script`)
	// commandName matches the name in an error about a command outside of
	// scripts. Inside of them the error has no name.
	commandName = regexp.MustCompile("^[^`'\"]*[`'\"]([^`'\"\\s]+)[`'\"]")

	// wholeCluster are the codes that only a Redis Cluster answers with.
	wholeCluster = []string{"MOVED", "ASK", "CROSSSLOT", "CLUSTERDOWN", "TRYAGAIN"}
	wrongUser    = []string{"NOPERM", "NOAUTH", "WRONGPASS", "DENIED"}
	// wrongUserTexts are what Redis says about users without a code of its own:
	// before 7.2 in scripts, and if a password is given and none is set.
	wrongUserTexts = []string{"The user executing the script", "ACL failure in script", "AUTH <password> called without", "Client sent AUTH"}
)

// said returns the text with which Redis answered err, as it would be outside
// of a script and without the code ERR. Ok is false if Redis did not answer.
func said(err error) (text string, ok bool) {
	var answer redis.Error
	if !errors.As(err, &answer) || errors.Is(err, redis.Nil) {
		return "", false
	}
	return bare(answer.Error()), true
}

func bare(text string) string { return strings.TrimSpace(inScript.ReplaceAllString(text, "")) }

// hasCode reports whether a bare text begins with one of the codes.
func hasCode(text string, codes ...string) bool {
	code, _, _ := strings.Cut(text, " ")
	return slices.Contains(codes, strings.TrimSuffix(code, ":"))
}

func isFull(text string) bool { return hasCode(text, "OOM") }

func isForbidden(text string) bool {
	return hasCode(text, wrongUser...) ||
		slices.ContainsFunc(wrongUserTexts, func(mark string) bool { return strings.Contains(text, mark) })
}

func isMissing(text string) bool { return missingCommand.MatchString(text) }

// explained adds the meaning of an error of Redis, if it is known.
func (s *Store) explained(err error) error {
	text, ok := said(err)
	if !ok {
		return err
	}
	switch {
	case isFull(text):
		return fmt.Errorf("%w: %w", ErrFull, err)
	case isForbidden(text) || redis.IsPermissionError(err) || redis.IsAuthError(err):
		return fmt.Errorf("%w: %w", ErrForbidden, err)
	case isMissing(text):
		// Without Redis's text: it repeats the arguments, and those of AUTH are
		// credentials.
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

// misfit returns what to do about an answer that shows that this client can
// never work with this Redis; "" if it may work later.
func (s *Store) misfit(text string) string {
	switch c := s.client.(type) {
	case *redis.ClusterClient:
		if low := strings.ToLower(text); strings.Contains(low, "cluster") && strings.Contains(low, "disabled") {
			return "this is no Redis Cluster, so use redis.NewClient"
		}
	case *redis.Client:
		switch {
		case hasCode(text, wholeCluster...), strings.Contains(text, "SELECT is not allowed in cluster mode"):
			return useCluster
		case hasCode(text, "READONLY", "MASTERDOWN") && !followsMaster(c):
			return useMaster
		case strings.Contains(text, "DB index is out of range"), strings.Contains(text, "invalid DB index"):
			return fmt.Sprintf("it has no database %d", c.Options().DB)
		}
	}
	return ""
}

// Confirmed reports whether an answer that Start would fail with is final. That
// of a replica or a Cluster may be one of a Redis that is being replaced: INFO
// must not contradict it.
func (s *Store) Confirmed(ctx context.Context, err error) bool {
	text, ok := said(err)
	if !ok || !errors.Is(err, ErrMisfit) {
		return true
	}
	section, field, other := "", "", ""
	switch {
	case hasCode(text, "READONLY", "MASTERDOWN"):
		section, field, other = "replication", "role", "master"
	case hasCode(text, wholeCluster...):
		section, field, other = "server", "redis_mode", "standalone"
	default:
		return true
	}
	info, err := call(ctx, s, func(ctx context.Context) (string, error) { return s.client.Info(ctx, section).Result() })
	if err != nil {
		text, ok := said(err)
		return ok && !ownCode.MatchString(text) // it knows no such section
	}
	return infoField(info, field) != other
}

// followsMaster reports whether the client asks Sentinel for the master: then
// it may reach a demoted one for a moment. Only such a client has that address.
func followsMaster(c *redis.Client) bool { return c.Options().Addr == "FailoverClient" }

// refusal is the error for one op that Redis refused, in its words.
func refusal(text string) error {
	switch {
	case isFull(bare(text)):
		return fmt.Errorf("%w: %w: %s", ErrUnavailable, ErrFull, text)
	case aboutData(text):
		return fmt.Errorf("%w: %w: %s", ErrUnavailable, ErrData, text)
	}
	return fmt.Errorf("%w: %s", ErrUnavailable, text)
}
