package store

import (
	"errors"
	"testing"
	"time"

	"github.com/redis/go-redis/v9"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

// answer is an error as Redis sends it.
type answer string

func (a answer) Error() string { return string(a) }
func (answer) RedisError()     {}

// The errors of Redis in and outside of scripts, before and since 7.0, and those of
// other servers that speak its protocol.
func TestReasonsOfRefusals(t *testing.T) {
	t.Parallel()
	const old = "ERR Error running script (call to f_5e1f): @user_script:1: @user_script: 1: "
	kinds := []error{ErrFull, ErrForbidden, ErrMissing, ErrMisfit}
	plain := New(redis.NewClient(&redis.Options{Addr: "127.0.0.1:1", DB: 3}), testKeys{buckets: 1})
	sentinel := New(redis.NewFailoverClient(&redis.FailoverOptions{MasterName: "m", SentinelAddrs: []string{"127.0.0.1:1"}}), testKeys{buckets: 1})
	cluster := New(redis.NewClusterClient(&redis.ClusterOptions{Addrs: []string{"127.0.0.1:1"}}), testKeys{buckets: 1})
	for _, s := range []*Store{plain, sentinel, cluster} {
		t.Cleanup(func() { _ = s.client.Close() })
	}
	for _, c := range []struct {
		text string
		kind error // nil: it may pass
		to   []*Store
	}{
		{"OOM command not allowed when used memory > 'maxmemory'. script: 1f, on @user_script:1.", ErrFull, nil},
		{"OOM command not allowed when used memory > 'maxmemory'.", ErrFull, nil},
		{old + "-OOM command not allowed when used memory > 'maxmemory'. ", ErrFull, nil},
		{"ERR Error running script (call to f_5e1f): @user_script:12: -OOM command not allowed when used memory > 'maxmemory'.\r\n", ErrFull, nil},
		{"@user_script: 12: -OOM command not allowed when used memory > 'maxmemory'.\r\n", ErrFull, nil},

		{"NOPERM this user has no permissions to run the 'hlen' command or its subcommand", ErrForbidden, nil},
		{"NOPERM ACL failure in script: User mesh has no permissions to run the 'hlen' command", ErrForbidden, nil},
		{"ERR ACL failure in script: User mesh has no permissions to run the 'hlen' command", ErrForbidden, nil},
		{old + "The user executing the script can't run this command or subcommand", ErrForbidden, nil},
		{old + "-NOPERM this user has no permissions to access one of the keys used as arguments", ErrForbidden, nil},
		{"NOAUTH Authentication required.", ErrForbidden, nil},
		{"WRONGPASS invalid username-password pair or user is disabled.", ErrForbidden, nil},
		{"DENIED Redis is running in protected mode because protected mode is enabled", ErrForbidden, nil},
		{"ERR AUTH <password> called without any password configured for the default user. Are you sure your configuration is correct?", ErrForbidden, nil},

		{"ERR unknown command 'hlen', with args beginning with: 'k' ", ErrMissing, nil},
		{"ERR unknown command `hlen`, with args beginning with: `k`, ", ErrMissing, nil},
		{"ERR unknown command `HLEN`", ErrMissing, nil},
		{"ERR unknown command", ErrMissing, nil},
		{"ERR unknown subcommand 'slots'. Try CLUSTER HELP.", ErrMissing, nil},
		{"ERR Unknown subcommand or wrong number of arguments for 'slots'. Try CLUSTER HELP.", ErrMissing, nil},
		{"ERR unsupported command 'eval'", ErrMissing, nil},
		{"ERR Unknown Redis command called from script script: 1f, on @user_script:1.", ErrMissing, nil},
		{old + "Unknown Redis command called from Lua script", ErrMissing, nil},
		{"@user_script: 3: Unknown Redis command called from Lua script", ErrMissing, nil},

		{"MOVED 3999 127.0.0.1:6381", ErrMisfit, []*Store{plain, sentinel}},
		{"CROSSSLOT Keys in request don't hash to the same slot", ErrMisfit, []*Store{plain}},
		{"CLUSTERDOWN Hash slot not served", ErrMisfit, []*Store{plain}},
		{"CLUSTERDOWN The cluster is down", nil, []*Store{cluster}},
		{"TRYAGAIN Multiple keys request during rehashing of slot", nil, []*Store{cluster}},
		{"ERR SELECT is not allowed in cluster mode", ErrMisfit, []*Store{plain}},
		{"ERR This instance has cluster support disabled", ErrMisfit, []*Store{cluster}},
		{"ERR Cluster is disabled. Use --cluster_mode=yes to enable.", ErrMisfit, []*Store{cluster}},
		{"ERR DB index is out of range", ErrMisfit, []*Store{plain}},
		{"READONLY You can't write against a read only replica.", ErrMisfit, []*Store{plain}},
		{old + "-READONLY You can't write against a read only replica. ", ErrMisfit, []*Store{plain}},
		{"READONLY You can't write against a read only replica. script: 1f, on @user_script:1.", nil, []*Store{sentinel, cluster}},
		{"MASTERDOWN Link with MASTER is down and replica-serve-stale-data is set to 'no'.", ErrMisfit, []*Store{plain}},

		{"LOADING Redis is loading the dataset in memory", nil, nil},
		{"BUSY Redis is busy running a script. You can only call SCRIPT KILL or SHUTDOWN NOSAVE.", nil, nil},
		{"MISCONF Redis is configured to save RDB snapshots, but it's currently unable to persist to disk.", nil, nil},
		{old + "-MISCONF Redis is configured to save RDB snapshots", nil, nil},
		{"NOREPLICAS Not enough good replicas to write.", nil, nil},
		{"ERR max number of clients reached", nil, nil},
		{"WRONGTYPE Operation against a key holding the wrong kind of value", nil, nil},
		{"ERR the key OOM is not of this layout, unknown command", nil, nil},
	} {
		if c.to == nil {
			c.to = []*Store{plain, sentinel, cluster}
		}
		for _, s := range c.to {
			err := s.wrapError(answer(c.text))
			require.ErrorIs(t, err, ErrUnavailable)
			for _, kind := range kinds {
				assert.Equal(t, kind == c.kind, errors.Is(err, kind), "%T: %q is %v", s.client, c.text, kind)
			}
		}
	}
	for text, full := range map[string]bool{
		"OOM command not allowed when used memory > 'maxmemory'.":                             true,
		"@user_script: 12: -OOM command not allowed when used memory > 'maxmemory'.\r\n":      true,
		"WRONGTYPE Operation against a key holding the wrong kind of value":                   false,
		"@user_script: 12: -MISCONF Redis is configured to save RDB snapshots, but can't\r\n": false,
	} {
		require.Equal(t, full, errors.Is(refusal(text), ErrFull), text)
	}
}

// Redis repeats the arguments of an unknown command.
func TestMissingCommandHidesArguments(t *testing.T) {
	t.Parallel()
	s := New(redis.NewClient(&redis.Options{Addr: "127.0.0.1:1"}), testKeys{buckets: 1})
	defer func() { _ = s.client.Close() }()
	for _, text := range []string{
		"ERR unknown command 'auth', with args beginning with: 'mesh' 's3cr3t' ",
		"ERR unknown command `AUTH`, with args beginning with: `mesh`, `s3cr3t`, ",
	} {
		err := s.wrapError(answer(text))
		require.ErrorIs(t, err, ErrMissing)
		require.ErrorContains(t, err, "auth")
		require.NotContains(t, err.Error(), "s3cr3t")
	}
}

// Processes without a run_id, as in containers: all have process id 1 and the same
// port.
func TestProcessesWithoutARunID(t *testing.T) {
	t.Parallel()
	began := time.Now()
	at := func(after, up time.Duration, traits string) sighting {
		return sighting{traits: traits, up: up, at: began.Add(after)}
	}
	const s, day = time.Second, 24 * time.Hour
	for name, c := range map[string]struct {
		first, second sighting
		same          bool
	}{
		"asked again at once":       {at(0, 10*s, "1/6379/a"), at(0, 10*s, "1/6379/a"), true},
		"a whole second's rounding": {at(0, 10*s, "1/6379/a"), at(1900*time.Millisecond, 10*s, "1/6379/a"), true},
		"asked again later":         {at(0, 10*s, "1/6379/a"), at(day, 10*s+day, "1/6379/a"), true},
		"clocks that drift":         {at(0, 10*s, "1/6379/a"), at(day, day-s, "1/6379/a"), true},
		"restarted":                 {at(0, 10*s, "1/6379/a"), at(5*s, 3*s, "1/6379/a"), false},
		"restarted long ago":        {at(0, 10*s, "1/6379/a"), at(day, day/2, "1/6379/a"), false},
		"another process id":        {at(0, 10*s, "1/6379/a"), at(s, 11*s, "2/6379/a"), false},
		"failed over":               {at(0, 10*s, "1/6379/a"), at(s, 11*s, "1/6379/b"), false},
		"without uptime":            {at(0, -1, "7/6379/"), at(day, -1, "7/6379/"), true},
		"without uptime, restarted": {at(0, -1, "7/6379/"), at(s, -1, "8/6379/"), false},
	} {
		var p generations
		first := p.note("", c.first)
		require.Equal(t, c.same, first == p.note("", c.second), name)
		require.True(t, p.anyWeak())
		if !c.same { // the first one again counts as a third
			require.NotEqual(t, first, p.note("", c.first), name)
		}
	}
}
