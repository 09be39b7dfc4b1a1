package peer

import (
	"bufio"
	"context"
	"fmt"
	"maps"
	"net"
	"strconv"
	"strings"
	"sync"

	"github.com/redis/go-redis/v9"
)

// Usage is the usage of a Redis, since its start or between two measurements.
type Usage struct {
	Commands map[string]int64 // calls by command, those of scripts included
	CPU      float64          // seconds
}

// ReadUsage reads the usage of a Redis. The INFO calls for it are left out.
func ReadUsage(ctx context.Context, client *redis.Client) (Usage, error) {
	u := Usage{Commands: map[string]int64{}}
	for _, section := range []string{"commandstats", "cpu"} {
		text, err := client.Info(ctx, section).Result()
		if err != nil {
			return u, err
		}
		for line := range strings.Lines(text) {
			name, value, _ := strings.Cut(strings.TrimSpace(line), ":")
			if command, ok := strings.CutPrefix(name, "cmdstat_"); ok && command != "info" {
				calls, _, _ := strings.Cut(strings.TrimPrefix(value, "calls="), ",")
				if u.Commands[command], err = strconv.ParseInt(calls, 10, 64); err != nil {
					return u, err
				}
			}
			if name == "used_cpu_user" || name == "used_cpu_sys" {
				seconds, err := strconv.ParseFloat(value, 64)
				if err != nil {
					return u, err
				}
				u.CPU += seconds
			}
		}
	}
	return u, nil
}

// Since returns the usage between an earlier measurement and this one.
func (u Usage) Since(before Usage) Usage {
	out := Usage{Commands: map[string]int64{}, CPU: u.CPU - before.CPU}
	for name, n := range u.Commands {
		if n -= before.Commands[name]; n != 0 {
			out.Commands[name] = n
		}
	}
	return out
}

// Total returns the number of all commands.
func (u Usage) Total() (n int64) {
	for calls := range maps.Values(u.Commands) {
		n += calls
	}
	return n
}

// Scripts returns the number of script calls.
func (u Usage) Scripts() int64 { return u.Commands["evalsha"] + u.Commands["eval"] }

// Monitor counts the commands that scripts call. Redis counts them like any other, and
// only MONITOR shows the source of a command.
type Monitor struct {
	nc      net.Conn
	reading sync.WaitGroup

	mu   sync.Mutex // guards the fields below
	lua  map[string]int64
	seen []string // commands of clients, with their arguments
}

// StartMonitor begins to count.
func StartMonitor(addr string) (*Monitor, error) {
	nc, err := net.Dial("tcp", addr)
	if err != nil {
		return nil, err
	}
	m := &Monitor{nc: nc, lua: map[string]int64{}}
	lines := bufio.NewScanner(nc)
	lines.Buffer(nil, 1<<20)
	if _, err := nc.Write([]byte("MONITOR\r\n")); err != nil || !lines.Scan() || lines.Text() != "+OK" {
		return nil, fmt.Errorf("monitor: %q: %w", lines.Text(), err)
	}
	m.reading.Go(func() {
		for lines.Scan() {
			m.take(lines.Text())
		}
	})
	return m, nil
}

// take counts one line: +1339518083.107412 [0 lua] "set" "key" "value".
func (m *Monitor) take(line string) {
	_, rest, _ := strings.Cut(line, "[")
	source, text, ok := strings.Cut(rest, "] ")
	if !ok {
		return
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	if _, from, _ := strings.Cut(source, " "); from == "lua" {
		name, _, _ := strings.Cut(strings.TrimPrefix(text, `"`), `"`)
		m.lua[strings.ToLower(name)]++
		return
	}
	m.seen = append(m.seen, text[:min(len(text), 80)])
}

// Stop ends the counting. It returns, by command, the calls of scripts, and the commands
// of clients.
func (m *Monitor) Stop() (lua map[string]int64, sent []string) {
	_ = m.nc.Close()
	m.reading.Wait()
	return m.lua, m.seen
}
