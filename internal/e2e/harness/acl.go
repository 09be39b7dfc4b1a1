package harness

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"os"
	"strings"
	"testing"

	"github.com/redis/go-redis/v9"
	"github.com/stretchr/testify/require"

	"github.com/meshpresence/mesh"
)

// The rights that the Redis user of a server needs. docs/operations.md quotes them.
// Redis 6.2 knows all of them. HELLO and AUTH need no right.
const (
	AclKeys     = "~mesh:*"
	AclChannels = "&mesh:* &__keyevent@0__:expired"
	AclCommands = "+ping +info +time +eval +evalsha +publish +subscribe +unsubscribe " +
		"+type +exists +del +get +set +mget +mset +pexpire " +
		"+hget +hset +hsetnx +hmget +hdel +hlen +hgetall +hscan " +
		"+sadd +srem +scard +smismember +sscan +zadd +zrem +zscore +zrange"
	// AclCluster has the additional rights of a cluster client. AclConfig lets servers
	// set notify-keyspace-events themselves.
	AclCluster = "+cluster|slots +command"
	AclConfig  = "+config|get +config|set"
)

// AclOf returns the rules for a user with the password.
func AclOf(password string, more ...string) string {
	return strings.Join(append([]string{"on", ">" + password, AclKeys, "resetchannels", AclChannels, AclCommands}, more...), " ")
}

// optionsOf returns the options of a client for a URL. The file ca has the certificate
// authority to trust.
func optionsOf(url, ca string) (*redis.Options, error) {
	opts, err := redis.ParseURL(url)
	if err != nil {
		return nil, err
	}
	pem, err := os.ReadFile(ca)
	if err != nil {
		return nil, err
	}
	pool := x509.NewCertPool()
	pool.AppendCertsFromPEM(pem)
	opts.TLSConfig = &tls.Config{RootCAs: pool, ServerName: opts.TLSConfig.ServerName, MinVersion: tls.VersionTLS12}
	return opts, nil
}

func ClientAt(t *testing.T, url, ca string, setup ...func(*redis.Options)) *redis.Client {
	t.Helper()
	opts, err := optionsOf(url, ca)
	require.NoError(t, err)
	for _, f := range setup {
		f(opts)
	}
	c := redis.NewClient(opts)
	t.Cleanup(func() { _ = c.Close() })
	return c
}

// TryStart starts a server that must fail to start at once. It returns the error.
func TryStart(t *testing.T, client redis.UniversalClient, setup ...func(*mesh.Options)) error {
	t.Helper()
	opts := mesh.Options{Redis: client}
	for _, f := range setup {
		f(&opts)
	}
	srv, err := mesh.NewServer(opts)
	require.NoError(t, err)
	ctx, cancel := context.WithTimeout(t.Context(), MachineShare)
	defer cancel()
	err = srv.Start(ctx)
	require.NoError(t, ctx.Err(), "Start retried an error that lasts")
	require.NoError(t, srv.Shutdown(t.Context()))
	return err
}
