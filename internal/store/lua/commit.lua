-- commit.lua: a batch of changes that one owner asks for.
--
-- KEYS[1] fence of the incarnation   KEYS[2] its owned index   KEYS[3] rooms index of the bucket
--   then per op: join, update, leave: members, seq, conn, state;  connect, disconnect: connection-meta
-- ARGV[1] incarnation  ARGV[2] number of the batch  ARGV[3] epoch for rooms that have none
-- ARGV[4] prefix of event channels  ARGV[5] number of the newest batch known to have run here; '0': none;
--   'i': none, and KEYS[4] is the list of instances, on which the incarnation must stand
--   then per op its kind and
--   J, U: room conn entry tag ttl left metaVersion meta stateVersion flag stateLeft state
--   L:    room conn entry tag cause
--   K:    conn metaVersion meta fresh ('1': not registered by this incarnation before)
--   D:    conn
--
-- Reply: 'FENCED', 'LATE' or 'LOST' for the whole batch, otherwise per op one string:
--   '+' (D, U), '+ epoch seq tag' (L, U that changed something), '+ epoch seq tag members' (J; '+  members' where the room's position was lost),
--   '+ version meta' (K: Redis holds a newer one),
--   '0' no such entry, 'x' another entry ('x incarnation' to U: of which other one), '! text' refused by Redis, nothing changed.

local inc, number, epoch, channels = ARGV[1], ARGV[2], ARGV[3], ARGV[4]
local ownedKey, roomsKey = KEYS[2], KEYS[3]

-- A batch that sat in a proxy while a later one ran is dropped whole: what it
-- would write has been decided anew since. The same number again is a retry.
local last = redis.call('GET', KEYS[1])
if last == 'dead' then
  return 'FENCED'
end
if last and tonumber(last) > tonumber(number) then
  return 'LATE'
end
-- Redis lost everything, the fence too: this may be a batch of a server that
-- has been dead for long. Or it lacks a batch that was acknowledged: it has gone
-- back, or is an old master that does not know it yet, and would lose this one.
if ARGV[5] == 'i' then
  if not last and not redis.call('ZSCORE', KEYS[4], inc) then
    return 'LOST'
  end
elseif tonumber(last or '0') < tonumber(ARGV[5]) then
  return 'LOST'
end

local function failed(v)
  return type(v) == 'table' and v.err
end

-- Out of memory Redis refuses the first write of a script that may take more,
-- and lets it go on after any other. Leaving must always be possible; the rest
-- is refused op by op, as long as nothing of the batch has left.
local full = failed(redis.pcall('SET', KEYS[1], number, 'PX', 86400000))
if full then
  redis.call('PEXPIRE', KEYS[1], 86400000)
  redis.call('SET', KEYS[1], number, 'PX', 86400000)
end

local function read(key, conn)
  local v = redis.pcall('HGET', key, conn)
  if failed(v) then
    return nil, v.err
  end
  if not v then
    return nil
  end
  local r = decode(v)
  if not r then
    return nil, 'WRONGFORMAT a record is not of this layout'
  end
  return r
end

local function standing(key, p)
  return '+ ' .. p.e .. ' ' .. int(p.s) .. ' ' .. p.t
end

local function update(k, a)
  local r, err = read(k.members, a.conn)
  if err then
    return '! ' .. err
  end
  if not r then
    return '0'
  end
  if r.entry ~= a.entry then
    -- Of the same incarnation it is an older one of that connection, which a
    -- late batch brought back after Redis forgot the numbers: to be replaced.
    -- Taken for another server's it would cost the connection its place.
    return r.inc == inc and '0' or 'x ' .. r.inc
  end
  local moved
  local metaNew = tonumber(a.mv) > tonumber(r.mv)
  local stateNew = tonumber(a.sv) > tonumber(r.sv)
  if metaNew then
    local p, prev = advance(k.seq, epoch, a.tag)
    if not p then
      return '! ' .. prev
    end
    moved = p
    r.seq, r.mv, r.meta = int(p.s), a.mv, a.meta
    publish(channels .. a.room, 'M', p, prev, '.', a.conn, r, r.meta, r.state)
  end
  if stateNew then
    local had = r.state ~= ''
    r.sv = a.sv
    if had or a.state ~= '' then
      local p, prev = advance(k.seq, epoch, a.tag .. '+')
      if not p then
        return '! ' .. prev
      end
      moved = p
      r.seq, r.flag, r.state, r.til = int(p.s), a.flag, a.state, '0'
      if tonumber(a.stateLeft) > 0 then
        r.til = int(now + tonumber(a.stateLeft))
      end
      setState(k.state, a.state, a.stateLeft)
      publish(channels .. a.room, 'S', p, prev, '.', a.conn, r, '', a.state)
    end
  end
  local hadTTL = r.ttl ~= '0'
  if metaNew or stateNew or r.ttl ~= a.ttl then
    r.ttl = a.ttl
    redis.call('HSET', k.members, a.conn, encode(r, r.meta, r.state))
  end
  if a.ttl == '0' then
    if a.left ~= '0' or hadTTL then
      redis.call('DEL', k.conn)
    end
  elseif a.left ~= '0' then
    redis.call('SET', k.conn, a.entry, 'PX', a.left)
  end
  return moved and standing(k.seq, moved) or '+'
end

local function join(k, a)
  local old, err = read(k.members, a.conn)
  if err then
    return '! ' .. err
  end
  if old and old.entry == a.entry then
    -- It has run before and its reply was lost. The same batch again changes
    -- nothing; one that was made anew since may bring a state, metadata or a
    -- TTL that the first had not, and its owner takes them for written.
    local out = update(k, a)
    if string.sub(out, 1, 1) ~= '+' then
      return out
    end
    local h = redis.call('HMGET', k.seq, 'e', 's', 't')
    local at = h[1] and (h[1] .. ' ' .. h[2] .. ' ' .. h[3]) or ''
    return '+ ' .. at .. ' ' .. redis.call('HLEN', k.members)
  end
  local p, prev = advance(k.seq, epoch, a.tag)
  if not p then
    return '! ' .. prev
  end
  local til = '0'
  if tonumber(a.stateLeft) > 0 then
    til = int(now + tonumber(a.stateLeft))
  end
  local r = {
    entry = a.entry, inc = inc, seq = int(p.s), at = int(now), ttl = a.ttl, mv = a.mv, sv = a.sv, flag = a.flag, til = til,
  }
  if old then
    r.at = old.at
    home(k.seq, old.inc, -1)
    if old.inc == inc then
      redis.call('SREM', ownedKey, 'e ' .. a.conn .. ' ' .. old.entry .. ' ' .. a.room)
    end
  end
  redis.call('HSET', k.members, a.conn, encode(r, a.meta, a.state))
  if a.ttl ~= '0' then
    redis.call('SET', k.conn, a.entry, 'PX', a.left)
  elseif old then
    redis.call('DEL', k.conn)
  end
  if old or a.state ~= '' then
    setState(k.state, a.state, a.stateLeft)
  end
  redis.call('SADD', ownedKey, 'e ' .. a.conn .. ' ' .. a.entry .. ' ' .. a.room)
  home(k.seq, inc, 1)
  local total = redis.call('HLEN', k.members)
  if total == 1 then
    redis.call('SADD', roomsKey, a.room)
    redis.call('PERSIST', k.seq)
  end
  local kind = 'J'
  if old then
    kind = 'R'
  end
  publish(channels .. a.room, kind, p, prev, '.', a.conn, r, a.meta, a.state)
  return standing(k.seq, p) .. ' ' .. total
end

local function leave(k, a)
  local r, err = read(k.members, a.conn)
  if err then
    return '! ' .. err
  end
  if not r or r.entry ~= a.entry then
    redis.call('SREM', ownedKey, 'e ' .. a.conn .. ' ' .. a.entry .. ' ' .. a.room)
    if r then
      return 'x'
    end
    return '0'
  end
  err = remove(k, a.room, a.conn, r, epoch, a.tag, a.cause, channels .. a.room)
  if err then
    return '! ' .. err
  end
  return standing(k.seq, positions[k.seq])
end

local function connect(key, conn, version, meta, fresh)
  local h = redis.pcall('HMGET', key, 'v', 'd', 'o')
  if h.err then
    return '! ' .. h.err
  end
  local w
  if fresh == '1' and h[1] and h[3] ~= inc then
    -- Left behind by a connection of that id that another server had: not
    -- this one's metadata, whatever their version.
    local v = int(tonumber(h[1]) + 1)
    w = redis.pcall('HSET', key, 'o', inc, 'v', v, 'd', meta)
    if failed(w) then
      return '! ' .. w.err
    end
    redis.call('SADD', ownedKey, 'c ' .. conn)
    return '+ ' .. v .. ' ' .. meta
  end
  if h[1] and tonumber(h[1]) > tonumber(version) then
    w = redis.pcall('HSET', key, 'o', inc)
  else
    w = redis.pcall('HSET', key, 'o', inc, 'v', version, 'd', meta)
  end
  if failed(w) then
    return '! ' .. w.err
  end
  redis.call('SADD', ownedKey, 'c ' .. conn)
  if h[1] and tonumber(h[1]) > tonumber(version) then
    return '+ ' .. h[1] .. ' ' .. (h[2] or '')
  end
  return '+'
end

local function disconnect(key, conn)
  local o = redis.pcall('HGET', key, 'o')
  if failed(o) then
    return '! ' .. o.err
  end
  redis.call('SREM', ownedKey, 'c ' .. conn)
  if o and o == inc then
    redis.call('DEL', key)
  end
  return '+'
end

local reply = {}
local ki, ai = 4, 6
if ARGV[5] == 'i' then
  ki = 5
end
while ai <= #ARGV do
  local kind = ARGV[ai]
  local out
  if kind == 'K' then
    out = full and '! ' .. full or connect(KEYS[ki], ARGV[ai + 1], ARGV[ai + 2], ARGV[ai + 3], ARGV[ai + 4])
    ki, ai = ki + 1, ai + 5
  elseif kind == 'D' then
    out = disconnect(KEYS[ki], ARGV[ai + 1])
    ki, ai = ki + 1, ai + 2
  else
    local k = {
      members = KEYS[ki], seq = KEYS[ki + 1], conn = KEYS[ki + 2], state = KEYS[ki + 3], owned = ownedKey, rooms = roomsKey,
    }
    local a = { room = ARGV[ai + 1], conn = ARGV[ai + 2], entry = ARGV[ai + 3], tag = ARGV[ai + 4] }
    if kind == 'L' then
      a.cause = ARGV[ai + 5]
      out = leave(k, a)
      ai = ai + 6
    else
      a.ttl, a.left, a.mv, a.meta = ARGV[ai + 5], ARGV[ai + 6], ARGV[ai + 7], ARGV[ai + 8]
      a.sv, a.flag, a.stateLeft, a.state = ARGV[ai + 9], ARGV[ai + 10], ARGV[ai + 11], ARGV[ai + 12]
      if full and kind == 'U' then
        -- A sign of life takes no memory that is not taken: refused, it would
        -- have everybody reaped who has a TTL. Only the rest of the op is.
        local more = a.mv ~= '0' or a.sv ~= '0'
        a.mv, a.sv = '0', '0'
        out = update(k, a)
        if more and out == '+' then
          out = '! ' .. full
        end
      elseif full then
        out = '! ' .. full
      elseif kind == 'J' then
        out = join(k, a)
      else
        out = update(k, a)
      end
      ai = ai + 13
    end
    ki = ki + 4
  end
  reply[#reply + 1] = out
end
return reply
