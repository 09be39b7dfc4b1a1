-- reap.lua: ends entries and states of others, each only on its ground. The
-- record is the claim: whoever takes it away tells, everybody else finds it gone.
--
-- KEYS[1] rooms index of the bucket, then per item: members, seq, conn, state, owned, fence (of the entry's incarnation)
-- ARGV[1] random tag of the batch, also the epoch for rooms that have none  ARGV[2] prefix of event channels
-- ARGV[3] where the caller expects this clock (unix ms)  ARGV[4] tolerance (ms)
--   then per item: mode room conn entry stateVersion
--   mode t: its per-connection key is gone;  s: its state's key is gone;  d: its owner is fenced;  f: no ground needed
--
-- Reply: 'CLOCK', or per item '+' ended now, 'a' the ground does not hold, '0' ended before, '! text'.

local args, keys = ARGV, KEYS
local batch, channels = args[1], args[2]
if math.abs(now - tonumber(args[3])) > tonumber(args[4]) then
  return 'CLOCK'
end

-- Not refused when Redis is out of memory, and after it nothing else is:
-- ending is always possible.
try('SREM', keys[1], '')

local indexes = {} -- changes of owned indexes, by key

local function unlist(key, name)
  local index = indexes[key]
  if not index then
    index = {}
    indexes[key] = index
  end
  index[name] = false
end

-- dropState ends the state of a present entry and tells so.
local function dropState(stateKey, conn, entry, inc, ttl, version, mv, meta, joined, mark)
  local err = advance(mark, batch, '@' .. inc, 0)
  if err then
    return '! ' .. err
  end
  local who = entry .. ' ' .. inc .. ' ' .. ttl .. ' 0 ' .. version .. ' . ' .. mv .. ' '
  local since = ' 0 ' .. joined .. ' ' .. seq .. '\n'
  call('HSET', members, conn, who .. #meta .. since .. meta)
  call('DEL', stateKey)
  publish('S', '.', conn, who .. '0' .. since)
  return '+'
end

-- judge ends the entry or the state of the room at hand whose keys begin at
-- keys[ki]: members, seq, conn, state, owned, fence.
local function judge(ki, mode, conn, entry, mark, version)
  local v = try('HGET', members, conn)
  if failed(v) then
    return '! ' .. v.err
  end
  local connKey, stateKey = keys[ki + 2], keys[ki + 3]
  local name = 'e ' .. conn .. ' ' .. entry .. ' ' .. room
  local _, stop, id, inc, ttl, sl, sv, _, mv, ml, til, joined
  if v then
    _, stop, id, inc, ttl, sl, sv, _, mv, ml, til, joined = find(v, RECORD)
  end
  if id ~= entry then
    unlist(keys[ki + 4], name)
    return '0'
  end
  local cause = 'l'
  if mode == 's' then
    if sl == '0' or sv ~= version then
      return '0'
    end
    if til == '0' or call('EXISTS', stateKey) == 1 then
      return 'a'
    end
    return dropState(stateKey, conn, entry, inc, ttl, sv, mv, sub(v, stop + 1, stop + tonumber(ml)), joined, mark)
  elseif mode == 't' then
    if ttl == '0' or call('EXISTS', connKey) == 1 then
      return 'a'
    end
    cause = 's'
  elseif mode == 'd' then
    if call('GET', keys[ki + 5]) ~= 'dead' then
      return 'a'
    end
    cause = 'd'
  end
  if ttl == '0' and sl == '0' then
    connKey = nil
  end
  local err = remove(conn, entry, inc, connKey, stateKey, mark, batch, '@' .. inc, cause)
  if err then
    return '! ' .. err
  end
  unlist(keys[ki + 4], name)
  return '+'
end

local reply = {}
local ki = 2
for ai = 5, #args, 5 do
  if keys[ki] ~= members then
    enter(args[ai + 1], keys[ki], keys[ki + 1], channels)
  end
  reply[#reply + 1] = judge(ki, args[ai], args[ai + 2], args[ai + 3], batch .. #reply, args[ai + 4])
  ki = ki + 6
end
for key, index in pairs(indexes) do
  write(key, index)
end
write(keys[1], rooms)
return reply
