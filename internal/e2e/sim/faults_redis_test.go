package sim

import (
	"strconv"
	"time"

	"github.com/redis/go-redis/v9"
)

// errors makes Redis answer everything with an error.
func (s *sim) errors() bool {
	text := simRefusals[s.rng.IntN(len(simRefusals))]
	s.note("redis answers %s", text)
	s.mem.SetError(text)
	s.disturb(s.between(0.1, 2*s.lease.Seconds()), func() {
		s.mem.SetError("")
		s.mu.Lock()
		s.outageUntil(time.Now())
		s.mu.Unlock()
	})
	return true
}

// lost records that Redis lost data, possibly metadata that another server set.
func (s *sim) lost(text string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.noted("%s", text)
	s.outageUntil(time.Now())
	for _, c := range s.clients {
		c.metaBad = true
	}
}

func (s *sim) flushAll() bool {
	s.mem.FlushAll()
	s.lost("flushall")
	s.disturb(s.recovery(), nil)
	return true
}

func (s *sim) restart() bool {
	if err := s.mem.Restart(); err != nil {
		panic(err)
	}
	s.lost("restart")
	s.disturb(s.recovery(), nil)
	return true
}

// moveClock moves the clock of Redis forward by d.
func (s *sim) moveClock(d time.Duration) {
	s.mem.Advance(d)
	s.mu.Lock()
	defer s.mu.Unlock()
	s.ahead += d
}

// stepClock moves the clock of Redis. A server does not notice two steps that cancel
// each other out between two heartbeats.
func (s *sim) stepClock() bool {
	if time.Since(s.stepped) < 2*s.lease {
		return false
	}
	s.stepped = time.Now()
	d := 30 * time.Second
	if s.rng.IntN(2) == 0 {
		d = -d
	}
	s.note("redis's clock steps by %v", d)
	s.moveClock(d)
	wait := s.recovery()
	if d < 0 { // leases of dead servers last longer by this step, and by the steps before
		s.mu.Lock()
		until := time.Now()
		if s.lastOutage.After(until) {
			until = s.lastOutage
		}
		s.outageUntil(until.Add(-d))
		wait += time.Until(s.lastOutage)
		s.mu.Unlock()
	}
	s.disturb(wait, nil)
	return true
}

var simDump = redis.NewScript(`
local out = {}
for _, k in ipairs(redis.call('KEYS', '*')) do
  local t = redis.call('TYPE', k)['ok']
  local v = {}
  if t == 'string' then v = { redis.call('GET', k) }
  elseif t == 'hash' then v = redis.call('HGETALL', k)
  elseif t == 'set' then v = redis.call('SMEMBERS', k)
  elseif t == 'zset' then v = redis.call('ZRANGE', k, 0, -1, 'WITHSCORES') end
  out[#out + 1] = { k, t, redis.call('PTTL', k), v }
end
return out`)

// rollback is a failover to a replica that lags by a few seconds.
func (s *sim) rollback() bool {
	if s.allCut || s.active > 0 || time.Now().Before(s.restoring) {
		return false // a copy without an index would have entries of which Redis has no trace
	}
	keys, err := simDump.Run(s.ctx, s.admin, nil).Slice()
	if err != nil {
		s.note("no copy: %v", err)
		return false
	}
	taken := time.Now()
	behind, away := s.between(0, 5), s.between(0.01, 2)
	s.note("a copy for a failover in %v", behind)
	s.disturb(behind, func() {
		if s.allCut {
			return
		}
		s.setAll(true)
		cut := time.Now()
		s.disturb(away, func() {
			s.restore(keys, taken, cut)
			s.mem.NewRunID()
			s.setAll(false)
		})
	})
	return true
}

// restore loads a copy into Redis. An entry that had ended before the outage may exist
// again, and leave once more.
func (s *sim) restore(keys []any, taken, cut time.Time) {
	s.mem.FlushAll()
	old := time.Since(taken).Milliseconds()
	pipe := s.admin.Pipeline()
	for _, row := range keys {
		f := row.([]any)
		key, kind, ttl, values := f[0].(string), f[1].(string), f[2].(int64), f[3].([]any)
		if ttl >= 0 && ttl <= old {
			continue
		}
		switch kind {
		case "string":
			pipe.Set(s.ctx, key, values[0], 0)
		case "hash":
			pipe.HSet(s.ctx, key, values...)
		case "set":
			pipe.SAdd(s.ctx, key, values...)
		case "zset":
			for i := 0; i < len(values); i += 2 {
				score, _ := strconv.ParseFloat(values[i+1].(string), 64)
				pipe.ZAdd(s.ctx, key, redis.Z{Member: values[i], Score: score})
			}
		}
		if ttl > 0 {
			pipe.PExpire(s.ctx, key, time.Duration(ttl-old)*time.Millisecond)
		}
	}
	if _, err := pipe.Exec(s.ctx); err != nil {
		s.note("restore: %v", err)
	}
	s.lost("rolled back by " + time.Since(taken).String())
	s.mu.Lock()
	defer s.mu.Unlock()
	s.restored = time.Now().Add(s.recovery())
	for k := range s.entries {
		if f := s.fact(k, time.Now()); !f.present || f.since.After(cut) || s.clients[k.conn].server.maybeDead {
			e := s.entry(k)
			e.reasons = append(e.reasons, &simReason{from: time.Now(), text: "Redis was rolled back"})
		}
	}
}
