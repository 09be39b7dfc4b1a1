-- lib.lua: what every script that changes a room shares. It is put in front
-- of the script, so all of it is local and nothing runs by itself.
--
-- A record (one field of a room's hash, see codec.go) is
--   entry incarnation seq joinedAt ttl metaVersion stateVersion flag stateUntil metaLength \n meta state
-- with times in ms. Users' JSON stays bytes: its length says where it ends.

local clock = redis.call('TIME')
local now = tonumber(clock[1]) * 1000 + math.floor(tonumber(clock[2]) / 1000)

local function int(n)
  return string.format('%.0f', n)
end

local function decode(s)
  local _, stop, entry, inc, seq, at, ttl, mv, sv, flag, til, ml = string.find(s,
    '^(%S+) (%S+) (%d+) (%d+) (%d+) (%d+) (%d+) (%S) (%d+) (%d+)\n')
  if not stop then
    return nil
  end
  local cut = stop + tonumber(ml)
  return {
    entry = entry, inc = inc, seq = seq, at = at, ttl = ttl, mv = mv, sv = sv, flag = flag, til = til,
    meta = string.sub(s, stop + 1, cut), state = string.sub(s, cut + 1),
  }
end

local function encode(r, meta, state)
  return r.entry .. ' ' .. r.inc .. ' ' .. r.seq .. ' ' .. r.at .. ' ' .. r.ttl .. ' ' .. r.mv .. ' ' .. r.sv ..
    ' ' .. r.flag .. ' ' .. r.til .. ' ' .. #meta .. '\n' .. meta .. state
end

-- Where rooms stand, read once per call and room.
local positions = {}

-- advance moves a room one event on. It is the first write of every change:
-- where Redis refuses writes (out of memory, wrong type) it refuses this one,
-- and nothing else has been done. Returns the position and the tag before it,
-- or nil and the error.
local function advance(key, epoch, tag)
  local p = positions[key]
  if not p then
    local h = redis.pcall('HMGET', key, 'e', 's', 't')
    if h.err then
      return nil, h.err
    end
    if h[1] then
      p = { e = h[1], s = tonumber(h[2]), t = h[3] }
    else
      p = { e = epoch, s = 0, t = '-' }
    end
  end
  local w = redis.pcall('HSET', key, 'e', p.e, 's', int(p.s + 1), 't', tag)
  if type(w) == 'table' and w.err then
    return nil, w.err
  end
  local prev = p.t
  p.s = p.s + 1
  p.t = tag
  positions[key] = p
  return p, prev
end

local function publish(channel, kind, p, prev, cause, conn, r, meta, state)
  redis.call('PUBLISH', channel, kind .. ' ' .. p.e .. ' ' .. p.t .. ' ' .. prev .. ' ' .. int(now) .. ' ' ..
    cause .. ' ' .. conn .. ' ' .. encode(r, meta, state))
end

-- home counts the entries that an incarnation has in a room, so that a frame
-- for the room finds the servers to go to.
local function home(seqKey, inc, by)
  if redis.call('HINCRBY', seqKey, '@' .. inc, by) <= 0 then
    redis.call('HDEL', seqKey, '@' .. inc)
  end
end

-- How long an empty room's position is remembered.
local KEEP = 3600000

-- remove ends an entry that is known to be there.
-- k: its keys {members, seq, conn, state, owned, rooms}
local function remove(k, room, conn, r, epoch, tag, cause, channel)
  local p, prev = advance(k.seq, epoch, tag)
  if not p then
    return prev
  end
  redis.call('HDEL', k.members, conn)
  redis.call('DEL', k.conn, k.state)
  redis.call('SREM', k.owned, 'e ' .. conn .. ' ' .. r.entry .. ' ' .. room)
  home(k.seq, r.inc, -1)
  if redis.call('EXISTS', k.members) == 0 then
    redis.call('SREM', k.rooms, room)
    redis.call('PEXPIRE', k.seq, KEEP)
  end
  r.seq = int(p.s)
  r.mv, r.sv, r.flag, r.til = '0', '0', '.', '0'
  publish(channel, 'L', p, prev, cause, conn, r, '', '')
  return nil
end

-- setState writes the copy of a state for whoever looks, or takes it away.
local function setState(key, state, left)
  if state == '' then
    redis.call('DEL', key)
  elseif tonumber(left) > 0 then
    redis.call('SET', key, state, 'PX', left)
  else
    redis.call('SET', key, state)
  end
end

-- dropState ends the state of a present entry and tells so.
local function dropState(k, conn, r, version, epoch, tag, channel)
  local p, prev = advance(k.seq, epoch, tag)
  if not p then
    return prev
  end
  r.seq = int(p.s)
  r.sv, r.flag, r.til, r.state = version, '.', '0', ''
  redis.call('HSET', k.members, conn, encode(r, r.meta, ''))
  redis.call('DEL', k.state)
  publish(channel, 'S', p, prev, '.', conn, r, '', '')
  return nil
end
