package main

import (
	"net/http"
	"net/http/httptest"
	"os"
	"regexp"
	"strconv"
	"testing"
	"time"

	"github.com/redis/go-redis/v9"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/meshpresence/mesh"
	"github.com/meshpresence/mesh/meshtest"
)

func from(env map[string]string) func(string) string {
	return func(name string) string { return env[name] }
}

func TestSettings(t *testing.T) {
	t.Parallel()
	s, err := settingsFrom(from(map[string]string{"REDIS_URL": "redis://localhost:6379/3"}))
	require.NoError(t, err)
	assert.Equal(t, ":8080", s.listen)
	assert.Empty(t, s.origins)
	assert.Equal(t, 20*time.Second, s.spread)
	assert.Equal(t, 10*time.Second, s.shutdown)
	client := s.redis()
	defer client.Close()
	require.IsType(t, &redis.Client{}, client)
	assert.Equal(t, 3, client.(*redis.Client).Options().DB)

	s, err = settingsFrom(from(map[string]string{
		"REDIS_URL": "rediss://user:password@a:6379?addr=b:6379", "LISTEN_ADDR": ":1", "ALLOWED_ORIGINS": "https://a.example, https://b.example,",
		"DRAIN_SPREAD": "1m", "SHUTDOWN_TIMEOUT": "5s",
	}))
	require.NoError(t, err)
	assert.Equal(t, ":1", s.listen)
	assert.Equal(t, []string{"https://a.example", "https://b.example"}, s.origins)
	assert.Equal(t, time.Minute+cutOff+5*time.Second, s.stopTime())
	cluster := s.redis()
	defer cluster.Close()
	require.IsType(t, &redis.ClusterClient{}, cluster)
	opts := cluster.(*redis.ClusterClient).Options()
	assert.ElementsMatch(t, []string{"a:6379", "b:6379"}, opts.Addrs)
	assert.NotNil(t, opts.TLSConfig)
}

func TestInvalidSettings(t *testing.T) {
	t.Parallel()
	for name, text := range map[string]string{"REDIS_URL": "", "DRAIN_SPREAD": "20", "SHUTDOWN_TIMEOUT": "0s"} {
		env := map[string]string{"REDIS_URL": "redis://localhost"}
		env[name] = text
		_, err := settingsFrom(from(env))
		require.ErrorContains(t, err, name)
	}
	for _, u := range []string{"http://:secret@localhost", "redis://:secret@local host", "http://:secret@a?addr=b:1", "redis://:secret@a?no=1"} {
		_, err := settingsFrom(from(map[string]string{"REDIS_URL": u}))
		require.ErrorContains(t, err, "REDIS_URL")
		assert.NotContains(t, err.Error(), "secret")
	}
}

// The numbers in deployment.yaml agree with each other and with the program.
func TestDeploymentMatchesSettings(t *testing.T) {
	t.Parallel()
	data, err := os.ReadFile("deployment.yaml")
	require.NoError(t, err)
	text := string(data)
	find := func(pattern string) string {
		t.Helper()
		all := regexp.MustCompile(pattern).FindAllStringSubmatch(text, -1)
		require.Len(t, all, 1, pattern)
		return all[0][1]
	}
	seconds := func(pattern string) time.Duration {
		t.Helper()
		n, err := strconv.Atoi(find(pattern))
		require.NoError(t, err)
		return time.Duration(n) * time.Second
	}
	s, err := settingsFrom(from(map[string]string{
		"REDIS_URL":        "redis://localhost:6379",
		"DRAIN_SPREAD":     find(`- name: DRAIN_SPREAD\s+value: (\S+)`),
		"SHUTDOWN_TIMEOUT": find(`- name: SHUTDOWN_TIMEOUT\s+value: (\S+)`),
	}))
	require.NoError(t, err)
	preStop := seconds(`sleep:\s+seconds: (\d+)`)
	assert.Greater(t, seconds(`terminationGracePeriodSeconds: (\d+)`), preStop+s.stopTime())
	assert.GreaterOrEqual(t, seconds(`minReadySeconds: (\d+)`), preStop+s.spread, "pods drain one after the other")
	assert.Equal(t, ":"+find(`containerPort: (\d+)`), s.listen)
	assert.Equal(t, "0", find(`\n      maxUnavailable: (\d+)`))

	r := meshtest.StartRedis(t)
	client := r.Client()
	defer client.Close()
	srv, err := mesh.NewServer(mesh.Options{Redis: client})
	require.NoError(t, err)
	h := handler(srv)
	get := func(path string) int {
		rec := httptest.NewRecorder()
		h.ServeHTTP(rec, httptest.NewRequest(http.MethodGet, path, nil))
		return rec.Code
	}
	ready := find(`readinessProbe:\s+httpGet: \{path: ([^,]+),`)
	assert.Equal(t, http.StatusServiceUnavailable, get(ready))
	assert.Equal(t, http.StatusOK, get(find(`livenessProbe:\s+httpGet: \{path: ([^,]+),`)))
	require.NoError(t, srv.Start(t.Context()))
	assert.Equal(t, http.StatusOK, get(ready))
	require.NoError(t, srv.Shutdown(t.Context()))
}
